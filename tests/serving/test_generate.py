"""MultiLoRAModel.generate gives every row the text of its own adapter."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GenerationConfig

import fastlora
from fastlora import LoRAConfig, MultiLoRAModel
from tests.support.models import (
    error,
    gpt2,
    llama,
    logits,
    quiet,
    qwen2,
    randomise_lora,
    t5,
    tokens,
)

TARGETS = {
    llama: ["q_proj", "up_proj", "down_proj"],
    qwen2: "all-linear",
    gpt2: ["c_attn", "c_proj"],
    t5: ["q", "v", "wi", "wo"],
}
NAMES = ["one", None, "two", "one"]


pytestmark = quiet


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
def with_biases(tmp_path_factory: pytest.TempPathFactory) -> Fixture:
    return Fixture(qwen2, tmp_path_factory.mktemp("qwen2"))


@pytest.fixture(scope="module")
def of_conv1d(tmp_path_factory: pytest.TempPathFactory) -> Fixture:
    return Fixture(gpt2, tmp_path_factory.mktemp("gpt2"))


@pytest.fixture(scope="module")
def encoder_decoder(tmp_path_factory: pytest.TempPathFactory) -> Fixture:
    return Fixture(t5, tmp_path_factory.mktemp("t5"))


KINDS = ["decoder", "with_biases", "of_conv1d", "encoder_decoder"]


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
@pytest.mark.parametrize("kind", KINDS)
def test_generate_gives_every_row_its_own_text(request, kind, way, padded):
    fixture: Fixture = request.getfixturevalue(kind)
    ids, mask = prompt(padded)
    options = WAYS[way] | {"max_new_tokens": 7, "min_new_tokens": 7, "pad_token_id": 0}
    got = fixture.server.generate(ids, adapter_names=NAMES, attention_mask=mask, **options)
    want = fixture.expected(ids, mask, **options)
    assert torch.equal(got, want)
    copies = len(got) // len(NAMES)
    rows = got.view(len(NAMES), copies, -1)
    assert not torch.equal(rows[0], rows[1])
    if not padded:
        assert torch.equal(rows[0], rows[3])  # the same adapter, the same text


def test_generate_samples_of_prompt_share_its_adapter(decoder):
    """With the top token only, sampling is greedy: every copy must be its row's greedy text."""
    ids, mask = prompt(False)
    options = {"do_sample": True, "top_k": 1, "num_return_sequences": 3, "max_new_tokens": 5}
    got = decoder.server.generate(ids, adapter_names=NAMES, attention_mask=mask, **options)
    want = decoder.expected(ids, mask, do_sample=False, max_new_tokens=5)
    assert torch.equal(got, want.repeat_interleave(3, 0))


@pytest.mark.parametrize("name", ["one", "two", None])
def test_seeded_samples_equal_model_with_one_adapter(decoder, name):
    """A batch of one adapter draws as the model with that adapter draws."""
    ids, mask = prompt(False)
    options = {"do_sample": True, "num_return_sequences": 2, "max_new_tokens": 6}
    torch.manual_seed(11)
    got = decoder.server.generate(ids, adapter_names=[name] * 4, attention_mask=mask, **options)
    torch.manual_seed(11)
    assert torch.equal(got, decoder.alone[name].generate(ids, attention_mask=mask, **options))
    assert len(torch.unique(got, dim=0)) > 1


def test_generate_uses_num_beams_of_generation_config(decoder):
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


def test_generate_forgets_adapter_names_afterwards(decoder):
    ids, mask = prompt(False)
    decoder.server.generate(ids, adapter_names=NAMES, attention_mask=mask, max_new_tokens=2)
    with pytest.raises(RuntimeError, match="no adapters were named"):
        decoder.server.model.generate(ids, attention_mask=mask, max_new_tokens=2)


@pytest.mark.parametrize("kind", KINDS)
def test_adapter_scales_apply_row_by_row(request, kind):
    """Half an adapter, none of it and all of it, beside each other, beams and prompts alike."""
    fixture: Fixture = request.getfixturevalue(kind)
    ids, mask = prompt(True)
    names, scales = ["one", "one", "one", "two"], [1.0, 0.0, 0.5, -1.0]
    more = {"labels": tokens(4, 5)} if kind == "encoder_decoder" else {}
    got = logits(
        fixture.server, ids, attention_mask=mask, adapter_names=names, adapter_scales=scales, **more
    )
    for row, (name, scale) in enumerate(zip(names, scales, strict=True)):
        model = fixture.alone[name]
        layers = [m for m in model.modules() if hasattr(m, "scaling") and hasattr(m, "lora_A")]
        before = [layer.scaling for layer in layers]
        for layer in layers:
            layer.scaling *= scale
        alone = {key: t[row : row + 1] for key, t in more.items()}
        want = logits(model, ids[row : row + 1], attention_mask=mask[row : row + 1], **alone)
        for layer, scaling in zip(layers, before, strict=True):
            layer.scaling = scaling
        seen = slice(None) if more else mask[row].bool()
        # Encoder and decoder are twice the layers, with larger weights.
        assert error(got[row, seen], want[0, seen]) <= (5e-5 if more else 1e-5)
    options = {"num_beams": 2, "max_new_tokens": 5, "min_new_tokens": 5, "pad_token_id": 0}
    got = fixture.server.generate(
        ids, attention_mask=mask, adapter_names=["one"] * 4, adapter_scales=[1.0, 0, 1, 0],
        **options,
    )  # fmt: skip
    for row, name in enumerate(["one", None] * 2):
        one = fixture.alone[name]
        want = one.generate(ids[row : row + 1], attention_mask=mask[row : row + 1], **options)
        assert torch.equal(got[row], want[0])


@pytest.mark.parametrize(
    "scales, kind, says",
    [
        ([1.0], ValueError, "adapter_scales: expected 4, one a row, got 1"),
        ([1.0, 1.0, 1.0, float("nan")], ValueError, "adapter_scales: expected a finite number"),
        ([1.0, 1.0, 1.0, "x"], TypeError, "adapter_scales: expected a number"),
    ],
)
def test_server_refuses_bad_adapter_scales(decoder, scales, kind, says):
    ids, _ = prompt(False)
    with pytest.raises(kind, match=says):
        decoder.server(input_ids=ids, adapter_names=NAMES, adapter_scales=scales)


def test_running_generate_keeps_adapter_that_others_replace(tmp_path):
    """While others load another content under its name, unload and load it again."""
    fixture = Fixture(llama, tmp_path)
    server, (ids, mask) = fixture.server, prompt(False)
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    wants = [
        fixture.alone[name].generate(ids[:1], attention_mask=mask[:1], **options)[0]
        for name in ("one", "two")
    ]
    stop = threading.Event()

    def change() -> None:
        while not stop.is_set():
            for name in ("two", "one"):
                server.load_adapter(tmp_path / name, "one")
            server.unload_adapter("two", wait=True)
            server.load_adapter(tmp_path / "two", "two")

    other = threading.Thread(target=change)
    other.start()
    try:
        for _ in range(20):
            got = server.generate(ids, attention_mask=mask, adapter_names=["one"] * 4, **options)
            assert any(torch.equal(got[0], want) for want in wants)
            assert all(torch.equal(row, got[0]) for row in got)
    finally:
        stop.set()
        other.join()
