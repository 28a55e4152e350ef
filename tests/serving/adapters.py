"""Adapters in folders and servers of them, for the serving tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

import fastlora
from fastlora import LoRAConfig, MultiLoRAModel
from tests.support.models import (
    llama,
    randomise_lora,
)

# Different layers, ranks, scalings and dropout, as adapters of different people are.
ADAPTERS: dict[str, dict[str, Any]] = {
    "alice": {"r": 4, "target_modules": "all-linear"},
    "bob": {"r": 8, "target_modules": ["q_proj", "v_proj"], "lora_alpha": 24, "use_rslora": True},
    "carol": {"r": 2, "target_modules": r".*layers\.1\.(self_attn\.o|mlp\.\w+)_proj"},
    "dave": {"target_modules": ["q_proj", "up_proj"], "rank_pattern": {"up_proj": 3, "q_proj": 1}},
}


def adapt(model: nn.Module, options: dict[str, Any]) -> nn.Module:
    return randomise_lora(fastlora.replace_linear(model, LoRAConfig(**options)), 0.5)


def serve(
    folder: Path, *names: str, model: nn.Module | None = None, **options: Any
) -> MultiLoRAModel:
    server = MultiLoRAModel(model or llama(), max_rank=8, **options)
    for name in names:
        server.load_adapter(folder / name, name)
    return server


def model_with_adapter(
    folder: Path, name: str | None, dtype: torch.dtype = torch.float32
) -> nn.Module:
    """A model with this one adapter, by another path through the code."""
    model = llama(dtype=dtype)
    return model if name in (None, "__base__") else fastlora.load_adapter(model, folder / name)
