"""MultiLoRAModel around models that it can serve, and around models that it cannot."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fastlora
from fastlora import LoRAConfig, MultiLoRAModel
from fastlora.serving.layer import ServedLinear
from tests.models import assert_agree, bert, llama, logits, randomise_lora, tokens, untouched


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 2)
        self.experts = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])


def test_experts_are_refused_or_left_out():
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
def test_a_server_that_cannot_be(options, kind, says):
    model = llama()
    with untouched(model), pytest.raises(kind, match=says):
        MultiLoRAModel(model, **options)
    with pytest.raises(ValueError, match="already"):
        MultiLoRAModel(fastlora.replace_linear(llama(), LoRAConfig(target_modules=["q_proj"])))
    with pytest.raises(ValueError, match="already"):
        MultiLoRAModel(MultiLoRAModel(model).model)


def test_a_layer_that_does_not_see_the_batch_says_so():
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.proj(x.flatten(0, 1))

    server = MultiLoRAModel(Flat(), target_modules=["proj"])
    with pytest.raises(RuntimeError, match="does not see the batch"):
        server(torch.randn(2, 3, 8), adapter_names=[None, None])


def test_an_encoder_serves(tmp_path):
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
