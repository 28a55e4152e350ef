"""Generating with an adapter a row: every row writes what it writes with its adapter alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GenerationConfig

import fastlora
from fastlora import LoRAConfig, MultiLoRAModel
from tests.models import llama, randomise_lora, t5, tokens

TARGETS = {llama: ["q_proj", "up_proj", "down_proj"], t5: ["q", "v", "wi", "wo"]}
NAMES = ["one", None, "two", "one"]


class Fixture:
    """A server of two adapters, and the models with one adapter each."""

    def __init__(self, build: Callable[[], nn.Module], path: Path) -> None:
        config = LoRAConfig(r=4, target_modules=TARGETS[build])
        self.alone: dict[str | None, Any] = {None: build()}
        self.server = MultiLoRAModel(build(), max_rank=4)
        for seed, name in enumerate(("one", "two")):
            torch.manual_seed(seed)
            model = randomise_lora(fastlora.replace_linear(build(), config), 0.5)
            fastlora.save_adapter(model, path / name)
            self.server.load_adapter(path / name, name)
            self.alone[name] = model

    def expected(self, ids: Tensor, mask: Tensor, **options: Any) -> Tensor:
        rows = [
            self.alone[name].generate(ids[i : i + 1], attention_mask=mask[i : i + 1], **options)
            for i, name in enumerate(NAMES)
        ]
        return torch.cat(rows)


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Fixture:
    return Fixture(llama, tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def encoder_decoder(tmp_path_factory: pytest.TempPathFactory) -> Fixture:
    return Fixture(t5, tmp_path_factory.mktemp("t5"))


def prompt(padded: bool) -> tuple[Tensor, Tensor]:
    """One text for every row, so that only adapters differ; row 2 padded from the left."""
    ids = tokens(1, 6).repeat(len(NAMES), 1)
    mask = torch.ones_like(ids)
    if padded:
        ids[2, :3], mask[2, :3] = 0, 0
    return ids, mask


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "beams": {"num_beams": 3},
    "several beams": {"num_beams": 4, "num_return_sequences": 2},
    "no cache": {"do_sample": False, "use_cache": False},
    "a config": {"generation_config": GenerationConfig(num_beams=2, pad_token_id=0)},
}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["decoder", "encoder_decoder"])
def test_every_row_writes_what_it_writes_alone(request, kind, way, padded):
    fixture: Fixture = request.getfixturevalue(kind)
    ids, mask = prompt(padded)
    options = WAYS[way] | {"max_new_tokens": 7, "min_new_tokens": 7}
    got = fixture.server.generate(ids, adapter_names=NAMES, attention_mask=mask, **options)
    want = fixture.expected(ids, mask, **options)
    assert torch.equal(got, want)
    copies = len(got) // len(NAMES)
    rows = got.view(len(NAMES), copies, -1)
    assert not torch.equal(rows[0], rows[1])
    if not padded:
        assert torch.equal(rows[0], rows[3])  # the same adapter, the same text


def test_samples_of_one_prompt_share_its_adapter(decoder):
    """With the top token only, sampling is greedy: every copy must be its row's greedy text."""
    ids, mask = prompt(False)
    options = {"do_sample": True, "top_k": 1, "num_return_sequences": 3, "max_new_tokens": 5}
    got = decoder.server.generate(ids, adapter_names=NAMES, attention_mask=mask, **options)
    want = decoder.expected(ids, mask, do_sample=False, max_new_tokens=5)
    assert torch.equal(got, want.repeat_interleave(3, 0))


@pytest.mark.parametrize("name", ["one", "two", None])
def test_samples_under_a_seed_are_the_models_own(decoder, name):
    """A batch of one adapter draws as the model with that adapter draws."""
    ids, mask = prompt(False)
    options = {"do_sample": True, "num_return_sequences": 2, "max_new_tokens": 6}
    torch.manual_seed(11)
    got = decoder.server.generate(ids, adapter_names=[name] * 4, attention_mask=mask, **options)
    torch.manual_seed(11)
    assert torch.equal(got, decoder.alone[name].generate(ids, attention_mask=mask, **options))
    assert len(torch.unique(got, dim=0)) > 1


def test_defaults_that_the_model_brings(decoder):
    """num_beams may come from the model's own generation_config."""
    ids, mask = prompt(False)
    models = [decoder.server.model, *decoder.alone.values()]
    for model in models:
        model.generation_config.num_beams = 2
    try:
        got = decoder.server.generate(
            ids, adapter_names=NAMES, attention_mask=mask, max_new_tokens=4
        )
        assert torch.equal(got, decoder.expected(ids, mask, max_new_tokens=4))
    finally:
        for model in models:
            model.generation_config.num_beams = 1


def test_names_are_forgotten_after_generating(decoder):
    ids, mask = prompt(False)
    decoder.server.generate(ids, adapter_names=NAMES, attention_mask=mask, max_new_tokens=2)
    with pytest.raises(RuntimeError, match="no adapters were named"):
        decoder.server.model.generate(ids, attention_mask=mask, max_new_tokens=2)
