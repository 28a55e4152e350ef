"""Models whose modules read the weight of a layer instead of calling it, and some that call it."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as nnf

from tests.support.models import VOCABULARY

AUDIO = {"input_values": torch.randn(2, 800, generator=torch.Generator().manual_seed(0))}


def build_model(family: str, kind: str, seed: int = 0, **sizes: Any) -> nn.Module:
    """A tiny transformers model, ready to train."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = getattr(transformers, f"{family}Config")(**sizes)
        return getattr(transformers, family + kind)(config)


def wavlm(kind: str = "ForCTC", family: str = "WavLM", **options: Any) -> nn.Module:
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "conv_dim": (16, 16),
        "conv_stride": (5, 2),
        "conv_kernel": (10, 3),
        "num_feat_extract_layers": 2,
        "num_conv_pos_embeddings": 16,
        "num_conv_pos_embedding_groups": 4,
        "mask_time_prob": 0.0,
    }
    return build_model(family, kind, **sizes | options)


def mamba(family: str = "Mamba", **options: Any) -> nn.Module:
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
    return build_model(family, "ForCausalLM", **sizes | options)


def count_watch_hooks(model: nn.Module) -> int:
    """How many hooks the watch of a first forward has on it."""
    found = [h for m in model.modules() for h in (m._forward_pre_hooks | m._forward_hooks).values()]
    return sum(type(hook).__module__ == "fastlora.inspection.first_forward" for hook in found)


def helper(layer: nn.Linear, x: Tensor) -> Tensor:
    return nnf.linear(x, layer.weight, layer.bias)


class Handing(nn.Module):
    """Hands one of its layers to a function that reads it: its own source does not say."""

    def __init__(self, read: bool = True) -> None:
        super().__init__()
        self.inner, self.called, self.unused = (nn.Linear(4, 4) for _ in range(3))
        self.read = read

    def forward(self, x: Tensor) -> Tensor:
        # What is asked of a weight here computes nothing with it.
        weight = self.unused.weight
        x = x.to(weight) + weight.new_zeros(weight.shape[1]) + torch.zeros_like(weight).sum()
        return self.called(helper(self.inner, x) if self.read else self.inner(x))
