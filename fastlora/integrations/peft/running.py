"""What PEFT's layers run, beside what their configs say: hot-swapping changes only the layers."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

import peft
import torch
from torch import Tensor, nn

from fastlora.config import compute_scaling
from fastlora.config.listing import group_by_reason
from fastlora.config.matching import look_up


def read_rank(layer: Any) -> int:
    """The largest rank of a LoRA layer's adapters, of their tensors; 0 where it has none."""
    return max((_read_rank(layer, name) for name in layer.lora_A), default=0)


def list_misstated(model: nn.Module, layers: Mapping[str, Any]) -> dict[str, str]:
    """Lists layers with the adapters whose rank or scaling is not what their config says.

    layers: PEFT's LoRA layers by their names in ``model``; none is listed without configs.
    """
    configs: Any = getattr(model, "peft_config", None)
    if not isinstance(configs, Mapping):
        return {}
    prefix = {peft.PeftModel: "base_model.model.", peft.LoraModel: "model."}
    within = next((p for kind, p in prefix.items() if isinstance(model, kind)), "")
    texts = {}
    for name, layer in layers.items():
        parts = [
            text
            for adapter, config in configs.items()
            if adapter in layer.lora_A and isinstance(config, peft.LoraConfig)
            if (text := _explain_misstated(layer, adapter, config, name.removeprefix(within)))
        ]
        if parts:
            texts[name] = "; ".join(parts)
    return texts


def warn_before_saving(model: nn.Module, layers: Mapping[str, Any]) -> None:
    """Warns where PEFT's ``save_pretrained`` would write what no longer runs."""
    texts = list_misstated(model, layers)
    if texts:
        warnings.warn(
            f"peft_model: {'; '.join(group_by_reason(texts))}. PEFT's save_pretrained writes what "
            "the config says: set r, lora_alpha and their patterns in model.peft_config first",
            stacklevel=4,
        )


def _explain_misstated(layer: Any, adapter: str, config: peft.LoraConfig, name: str) -> str | None:
    r = look_up(config.rank_pattern or {}, name, config.r)
    alpha = look_up(config.alpha_pattern or {}, name, config.lora_alpha)
    configured = compute_scaling(alpha, r, config.use_rslora)
    runs = _read_number(layer.scaling[adapter])
    rank = _read_rank(layer, adapter)
    if rank == r and (runs is None or math.isclose(runs, configured, rel_tol=1e-6)):
        return None
    runs = configured if runs is None else runs
    return (
        f"adapter {adapter!r} runs with r={rank} and a scaling of {runs:g}, its config says r={r} "
        f"and {configured:g}"
    )


def _read_rank(layer: Any, adapter: str) -> int:
    A = layer.lora_A[adapter].weight
    # Of a parameter that is not gathered at the moment PEFT's own word is all there is.
    return A.shape[0] if A.dim() > 1 else layer.r[adapter]


def _read_number(value: float | Tensor) -> float | None:
    """Reads a scaling's value; None while tensors have none."""
    if isinstance(value, Tensor) and (value.is_meta or torch._C._len_torch_dispatch_stack()):
        return None
    return float(value)
