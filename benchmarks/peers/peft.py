"""PEFT as a provider: imported where installed."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness.case import Absent


def make_peft_linear(
    weight: Tensor, adapters: Sequence[tuple[Tensor, Tensor, float]], dropout: float = 0.0
) -> Any:
    """Makes PEFT's own ``lora.Linear`` on these very tensors; adapters are named "0", "1", …"""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise Absent(f"PEFT cannot be imported: {error}") from error

    model = nn.Module()
    model.linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    model.linear.weight = nn.Parameter(weight, requires_grad=False)
    for slot, (lora_A, _, _) in enumerate(adapters):
        config = LoraConfig(
            r=lora_A.shape[0],
            lora_dropout=dropout,
            target_modules=["linear"],
            init_lora_weights=False,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # every further adapter on one model is warned about
            inject_adapter_in_model(config, model, adapter_name=str(slot))
    layer: Any = model.linear
    for slot, (lora_A, lora_B, scaling) in enumerate(adapters):
        layer.lora_A[str(slot)].weight = nn.Parameter(lora_A.detach(), lora_A.requires_grad)
        layer.lora_B[str(slot)].weight = nn.Parameter(lora_B.detach(), lora_B.requires_grad)
        layer.scaling[str(slot)] = scaling
    return layer.train(dropout > 0)


def draw_torch_mask(like: Tensor, dropout: float, dtype: torch.dtype) -> Tensor:
    """Draws the mask that torch's dropout draws next for such an input."""
    ones = torch.ones_like(like, dtype=dtype)
    if like.requires_grad:  # where it does, a device may pick another kernel with other draws
        ones.requires_grad_()
    return nn.functional.dropout(ones, dropout).detach() != 0
