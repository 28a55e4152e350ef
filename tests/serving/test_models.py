"""MultiLoRAModel serves the models it can and refuses the others."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fastlora
from fastlora import LoRAConfig, MultiLoRAModel
from fastlora.serving.layer import ServedLinear
from tests.support.helpers import same_bits
from tests.support.models import (
    assert_agree,
    bert,
    llama,
    logits,
    randomise_lora,
    tokens,
    untouched,
)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 2)
        self.experts = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])


def test_server_refuses_experts_unless_excluded():
    model = Experts()
    with untouched(model), pytest.raises(ValueError, match=r"experts\.0 is an expert"):
        MultiLoRAModel(model)
    server = MultiLoRAModel(model, exclude_modules=r"experts\..*")
    assert [name for name, m in model.named_modules() if isinstance(m, ServedLinear)] == ["gate"]
    assert set(server.skipped) == {"experts.0", "experts.1"}


@pytest.mark.parametrize(
    "options, kind, says",
    [
        ({"max_adapters": 0}, ValueError, "max_adapters"),
        ({"max_rank": 1.5}, TypeError, "max_rank"),
        ({"target_modules": ["nothing"]}, ValueError, "no linear layer matches"),
        ({"target_modules": ["embed_tokens"]}, ValueError, "not an nn.Linear"),
    ],
)
def test_server_refuses_invalid_options_and_models(options, kind, says):
    model = llama()
    with untouched(model), pytest.raises(kind, match=says):
        MultiLoRAModel(model, **options)
    with pytest.raises(ValueError, match="already"):
        MultiLoRAModel(fastlora.replace_linear(llama(), LoRAConfig(target_modules=["q_proj"])))
    with pytest.raises(ValueError, match="already"):
        MultiLoRAModel(MultiLoRAModel(model).model)


class Flat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj, self.mine = nn.Linear(8, 8), nn.Parameter(torch.randn(2, 8))

    def forward(self, x: Tensor, mine: bool) -> Tensor:
        return self.proj(self.mine if mine else x.flatten(0, 1))


def test_layer_raises_when_it_does_not_see_batch(tmp_path):
    source = randomise_lora(fastlora.replace_linear(Flat(), LoRAConfig(target_modules=["proj"])))
    fastlora.save_adapter(source, tmp_path)
    server = MultiLoRAModel(Flat(), target_modules=["proj"])
    server.load_adapter(tmp_path, "one")
    x, names = torch.randn(2, 3, 8), ["one", None]
    got, base = server(x, False, adapter_names=names), server(x, False, adapter_names=[None] * 2)
    # Flattened tokens are still somebody's; as many rows of nobody's are not.
    assert same_bits(got[3:], base[3:])
    assert not same_bits(got[:3], base[:3])
    with pytest.raises(RuntimeError, match=r"does not see the batch: .*none of the batch's rows"):
        server(x, True, adapter_names=names)


def test_server_serves_adapters_of_an_encoder(tmp_path):
    """BERT: biases in the base, a head that is served where it is named."""
    options = {"r": 4, "target_modules": ["query", "dense", "decoder"]}
    source = randomise_lora(fastlora.replace_linear(bert(), LoRAConfig(**options)), 0.5)
    fastlora.save_adapter(source, tmp_path)
    server = MultiLoRAModel(bert(), max_rank=4, target_modules=["query", "dense", "decoder"])
    server.load_adapter(tmp_path, "one")
    ids = tokens(2, 6)
    got = logits(server, ids, adapter_names=["one", None])
    assert_agree(got[:1], logits(source, ids[:1]), logits(bert(), ids[:1]))
    assert_agree(got[1:], logits(bert(), ids[1:]))
