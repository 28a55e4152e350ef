"""PEFT's LoRA linear with fastlora's forward pass.

All of it is read from PEFT's own attributes at each call, so that whatever PEFT does to a layer
shows in the next one. What fastlora does not compute goes through PEFT's forward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import torch
from peft.tuners.lora import layer as lora
from torch import Tensor, nn

from fastlora import functional as F
from fastlora.integrations.peft.merging import Merging
from fastlora.integrations.peft.parts import (
    Adapter,
    Product,
    concatenate,
    explain_obstacle,
    is_dense,
    read_adapter,
    read_product,
)


class Linear(Merging):
    """``peft.tuners.lora.Linear`` on fastlora's kernels; its name and repr are PEFT's."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # Not super(): a hook may hold this method and call it when the class is PEFT's again.
        return forward(self, partial(lora.Linear.forward, self), x, *args, **kwargs)


def forward(
    layer: Any, by_peft: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    """Runs a patched layer; by_peft: PEFT's forward, for calls that fastlora does not compute."""
    rows = kwargs.get("adapter_names")
    more = args or len(kwargs) > ("adapter_names" in kwargs)
    if more or layer.disable_adapters or layer.merged or not is_dense(x):
        return by_peft(x, *args, **kwargs)
    chosen = layer.active_adapters
    if rows is not None:
        layer._check_forward_args(x, **kwargs)
        # "__base__" means no adapter, even if one is called so.
        chosen = [name for name in dict.fromkeys(rows) if name != "__base__"]
    present: Any = layer.lora_A
    names = [name for name in chosen if name in present._modules]
    if not names:
        return layer.base_layer(x)
    if explain_obstacle(layer, names, x.dtype) is not None:
        return by_peft(x, **kwargs)
    adapters = [read_adapter(layer, name) for name in names]
    if rows is None:
        return _run_one_for_all(layer, x, concatenate(adapters))
    if not _can_mix(adapters) or x.dim() < 2:
        return by_peft(x, **kwargs)
    return _run_one_a_row(layer, x, rows, names, adapters)


def _run_one_for_all(layer: Any, x: Tensor, adapters: Sequence[Adapter]) -> Tensor:
    """Runs every row through all of ``adapters``."""
    base = _read_base(layer, x)
    if base is None:
        y, others = _run_base(layer, x), adapters
    else:
        first, *others = adapters
        y = F.lora_linear(
            x, base.weight, first.lora_A, first.lora_B, first.scaling, bias=base.bias,
            lora_bias=first.lora_bias, dropout_p=first.dropout_p, training=True,
        )  # fmt: skip
    for A, B, bias, scaling, p in others:
        F.lora_add_(y, x.to(y.dtype), A, B, scaling, dropout_p=p, training=True)
        if bias is not None:
            y.add_(bias, alpha=scaling)
    return y


def _run_one_a_row(
    layer: Any,
    x: Tensor,
    rows: Sequence[str],
    names: Sequence[str],
    adapters: Sequence[Adapter],
) -> Tensor:
    """Runs row i of x through adapter ``rows[i]`` of ``names``, or none where it is not there."""
    # Copied anew at each call: PEFT swaps weights in ways that leave no trace on the parameter.
    R = max(a.lora_A.shape[0] for a in adapters)
    A = torch.stack([_pad(a.lora_A, 0, R) for a in adapters])
    B = torch.stack([_pad(a.lora_B, 1, R) for a in adapters])
    slots = {name: slot for slot, name in enumerate(names)}
    ids = tuple(slots.get(name, -1) for name in rows)
    flat = x.flatten(1, -2) if x.dim() > 3 else x
    tokens = flat.shape[1] if flat.dim() == 3 else 1
    groups, scalings = _group_rows(ids, tuple(a.scaling for a in adapters), tokens, x.device)
    base = _read_base(layer, x)
    if base is None:
        y = _run_base(layer, x)
        into = y.flatten(1, -2) if y.dim() > 3 else y
        F.multi_lora_add_(into, flat.to(y.dtype), A, B, groups, scalings)
        return y
    y = F.multi_lora_linear(flat, base.weight, A, B, groups, scalings, bias=base.bias)
    return y.view(*x.shape[:-1], y.shape[-1])


def _read_base(layer: Any, x: Tensor) -> Product | None:
    """Returns the base's operands, where it is a product that fastlora computes from x."""
    base = read_product(layer.base_layer)
    if isinstance(base, str) or base.weight.shape[1] != x.shape[-1]:
        return None
    same = x.dtype == base.weight.dtype
    return base if same or torch.is_autocast_enabled(x.device.type) else None


def _run_base(layer: Any, x: Tensor) -> Tensor:
    """Runs the base itself; the output's memory is held by no other."""
    return layer.base_layer(x).clone()


def _can_mix(adapters: Sequence[Adapter]) -> bool:
    """Whether one call of many adapters can take them."""
    alike = len({a.lora_A.dtype for a in adapters}) == 1
    return alike and all(a.lora_bias is None and not a.dropout_p for a in adapters)


def _pad(t: Tensor, dim: int, size: int) -> Tensor:
    missing = size - t.shape[dim]
    return nn.functional.pad(t, (0, missing) if dim else (0, 0, 0, missing)) if missing else t


def _group_rows(
    ids: tuple[int, ...], scalings: tuple[float, ...], tokens: int, device: torch.device
) -> tuple[F.RowGroups, Tensor]:
    """Groups rows of so many tokens; returns groups and scalings (S,), made once a batch."""
    # Tensors made within a compiler, tracer, mode or transform are valid only there.
    shared = not (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
    )
    make = _make_groups if shared else _make_groups.__wrapped__
    # Tensors made on a stream are ready only there.
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    # Tensors made in inference mode cannot be saved for backward.
    with torch.inference_mode(False):
        return make(ids, scalings, tokens, device, stream)


# A batch's layers see one or two lengths; more batches than this hardly run side by side.
@lru_cache(maxsize=16)
def _make_groups(
    ids: tuple[int, ...], scalings: tuple[float, ...], tokens: int, device: torch.device, _: int
) -> tuple[F.RowGroups, Tensor]:
    rows = torch.tensor(ids, dtype=torch.int32, device="cpu").to(device)
    groups = replace(F.group_rows(rows, len(scalings)), nobody=not any(slot >= 0 for slot in ids))
    return groups.repeat(tokens), torch.tensor(scalings, device="cpu").to(device)
