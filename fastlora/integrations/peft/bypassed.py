"""Layers of PEFT's that the model bypasses: warned of, and not merged."""

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
    """Raises RuntimeError where merging would add an adapter that had no part in the model so far.

    model: around PEFT's layers. adapter_names: what is to be merged, by default what is active.
    Adapters that add nothing pass.
    """
    layers = _list_outermost(
        (n, m) for n, m in model.named_modules() if isinstance(m, lora.LoraLayer)
    )
    adding = {
        name: layer
        for name, layer in layers.items()
        if any(_adds(layer, each) for each in adapter_names or layer.active_adapters)
    }
    first_forward.refuse_idle(model, adding)


def warn(model: nn.Module, layers: Mapping[str, nn.Module], stacklevel: int) -> None:
    """Warns, by name, of PEFT's ``layers`` that do nothing, or not what they did in training."""
    outermost = _list_outermost(layers.items())
    reasons = {
        name: explain_bypass(model, [name]) or explain_rescaling(model, [name])
        for name in outermost
    }
    reasons = {name: reason for name, reason in reasons.items() if reason is not None}
    if reasons:
        warnings.warn(
            "peft_model: PEFT's adapters of these layers are not what the model computes with, "
            f"unless they are merged: {list_some(group_by_reason(reasons), 8, '; ')}",
            stacklevel=stacklevel,
        )


def _list_outermost(layers: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Lists layers that lie within no other; an outer layer decides about its inner ones."""
    by_name = dict(layers)
    within = tuple(f"{name}." for name in by_name)
    return {name: layer for name, layer in by_name.items() if not name.startswith(within)}


def _adds(layer: Any, adapter: str) -> bool:
    """Whether an adapter's product, or bias, is anything but zero in a layer."""
    if adapter not in layer.lora_B:
        return False
    return any(bool(parameter.any()) for parameter in layer.lora_B[adapter].parameters())
