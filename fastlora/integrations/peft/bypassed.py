"""Layers of PEFT's that are not what a model computes with: warned of, and not merged."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from peft.tuners.lora import layer as lora
from torch import nn

from fastlora.config.listing import group_by_reason, list_some
from fastlora.inspection import first_forward
from fastlora.inspection.bypass import explain_bypass, explain_rescaling


def refuse(model: nn.Module, adapter_names: list[str] | None) -> None:
    """RuntimeError where merging would put an adapter to work that has had no part so far.

    model: around PEFT's layers. adapter_names: what is to be merged, by default what is active.
    Adapters that add nothing pass.
    """
    layers = _outermost((n, m) for n, m in model.named_modules() if isinstance(m, lora.LoraLayer))
    adding = {
        name: layer
        for name, layer in layers.items()
        if any(_adds(layer, each) for each in adapter_names or layer.active_adapters)
    }
    first_forward.refuse_idle(model, adding)


def warn(model: nn.Module, layers: Mapping[str, nn.Module], stacklevel: int) -> None:
    """Names those of PEFT's ``layers`` that do nothing, or not what they did in training."""
    alone = _outermost(layers.items())
    found = {
        name: explain_bypass(model, [name]) or explain_rescaling(model, [name]) for name in alone
    }
    found = {name: reason for name, reason in found.items() if reason is not None}
    if found:
        warnings.warn(
            "peft_model: PEFT's adapters of these layers are not what the model computes with, "
            f"unless they are merged: {list_some(group_by_reason(found), 8, '; ')}",
            stacklevel=stacklevel,
        )


def _outermost(layers: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Those within no other, which would know how to use them."""
    found = dict(layers)
    within = tuple(f"{name}." for name in found)
    return {name: layer for name, layer in found.items() if not name.startswith(within)}


def _adds(layer: Any, adapter: str) -> bool:
    """Whether an adapter's product, or bias, is anything but zero in a layer."""
    if adapter not in layer.lora_B:
        return False
    return any(bool(parameter.any()) for parameter in layer.lora_B[adapter].parameters())
