"""The multi-adapter ops in plain torch; ``backends/torch/linear.py`` has their conventions.

A row's adapter part comes from products of its own adapter's rows alone: neighbouring rows (a
sequence) are worked on in place, scattered ones (a decode batch) gathered. Gathering all adapters'
rows at once, sorted, was no more than 3 % faster on a CPU: the small products are what takes time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fastlora.backends.packed import add_each
from fastlora.backends.torch import products as library
from fastlora.backends.torch.wide_products import adapter_gradient, alone, base_gradient, linear

# Scattered rows that are gathered at a time: bounds what is held beside y to so many rows of N.
_GATHER = 256

# Neighbours as a slice, others by index. A group: a slot, its rows, its rank, its scaling.
Rows = slice | Tensor
Group = tuple[int, Rows, int, float]


def group_rows(ids: Tensor, num_slots: int) -> tuple[Tensor, Tensor, Tensor]:
    """ids (T,), order and starts of ``RowGroups``; an id out of range never gets further."""
    if ids.device.type == "cpu":
        if ids.numel() and (int(ids.min()) < -1 or int(ids.max()) >= num_slots):
            bad = int(ids[(ids < -1) | (ids >= num_slots)][0])
            raise ValueError(f"adapter_ids: expected ids in [-1, {num_slots}), got {bad}")
    else:
        # Reading them would wait for the device: there an id out of range means no adapter.
        ids = ids.where((ids >= 0) & (ids < num_slots), -1)
    ids = ids.to(torch.int32, copy=True)
    order = torch.argsort(ids, stable=True)
    slots = torch.arange(num_slots + 1, dtype=torch.int32, device=ids.device)
    return ids, order, torch.searchsorted(ids[order], slots)


def multi_lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    ids: Tensor,
    order: Tensor,
    starts: Tensor,
    scalings: Tensor,
    ranks: Tensor | None,
    row_scales: Tensor | None,
    invariant: bool = False,
) -> tuple[Tensor, Tensor]:
    y = linear(x, weight, bias, invariant)
    h = x.new_empty(x.shape[0], lora_A.shape[1])
    routing = (ids, order, starts, scalings, ranks, row_scales)
    multi_lora_add_(y, h, x, lora_A, lora_B, *routing, invariant)
    return y, h


def multi_lora_add_(
    y: Tensor,
    h: Tensor,
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    ids: Tensor,
    order: Tensor,
    starts: Tensor,
    scalings: Tensor,
    ranks: Tensor | None,
    row_scales: Tensor | None,
    invariant: bool = False,
) -> None:
    h.zero_()
    for slot, rows, r, scaling in groups(order, starts, scalings, ranks, lora_A.shape[1]):
        A, B = lora_A[slot, :r].to(x.dtype).T, lora_B[slot, :, :r].to(x.dtype).T
        if invariant:
            for row in range(rows.start, rows.stop) if isinstance(rows, slice) else rows.tolist():
                h_row = alone(x, row) @ A
                h[row, :r] = h_row[0]
                h_row = row_scaled(h_row, row_scales, slice(row, row + 1))
                y[row] = alone(y, row).addmm_(h_row, B, alpha=scaling)[0]
            continue
        h_rows = library.mm(take(x, rows), A)
        h[rows, :r] = h_rows
        h_rows = row_scaled(h_rows, row_scales, rows)
        _add_product(y, rows, h_rows, B, scaling)


def packed_lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, *packed: Any, invariant: bool = False
) -> Tensor:
    y = linear(x, weight, bias, invariant)
    packed_lora_add_(y, x, *packed, invariant=invariant)
    return y


def packed_lora_add_(y: Tensor, x: Tensor, *packed: Any, invariant: bool = False) -> None:
    add_each(multi_lora_add_, y, x, *packed, invariant=invariant)


def multi_lora_linear_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    h: Tensor,
    ids: Tensor,
    order: Tensor,
    starts: Tensor,
    scalings: Tensor,
    ranks: Tensor | None,
    row_scales: Tensor | None,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Gradients of (x, weight, bias, lora_A, lora_B): those that ``needs`` asks for."""
    need_x, need_weight, need_bias, need_A, need_B = needs
    dx = base_gradient(dy, x, weight) if need_x else None
    dA = zeros_wide(lora_A) if need_A else None
    dB = zeros_wide(lora_B) if need_B else None
    for slot, rows, r, scaling in groups(order, starts, scalings, ranks, lora_A.shape[1]):
        dy_rows = take(dy, rows)
        if dx is not None or dA is not None:
            g = library.mm(dy_rows, lora_B[slot, :, :r].to(dy.dtype))
            g = row_scaled(g, row_scales, rows)
            if dx is not None:
                _add_product(dx, rows, g, lora_A[slot, :r].to(x.dtype), scaling)
            if dA is not None:
                dA[slot, :r] += adapter_gradient(g, take(x, rows), dA.dtype, scaling)
        if dB is not None:
            h_rows = row_scaled(h[rows, :r], row_scales, rows)
            dB[slot, :, :r] += adapter_gradient(dy_rows, h_rows, dB.dtype, scaling)
    grads = [
        dx,
        library.mm(dy.T, x) if need_weight else None,
        dy.sum(0) if need_bias else None,
        None if dA is None else dA.to(lora_A.dtype),
        None if dB is None else dB.to(lora_B.dtype),
    ]
    return [grad for grad in grads if grad is not None]


def groups(
    order: Tensor, starts: Tensor, scalings: Tensor, ranks: Tensor | None, R: int
) -> Iterator[Group]:
    """The groups that have rows and a rank; scattered rows in parts of at most ``_GATHER``."""
    bounds, factors = starts.tolist(), scalings.tolist()
    limits = [R] * len(factors) if ranks is None else ranks.tolist()
    for slot, factor in enumerate(factors):
        # Before anything is written; slots that no row uses may hold whatever they like.
        if not math.isfinite(factor) and bounds[slot] < bounds[slot + 1]:
            raise ValueError(f"scalings: expected finite numbers, got {factor} for slot {slot}")
    for slot, (first, last) in enumerate(pairwise(bounds)):
        r = min(max(limits[slot], 0), R)
        if first == last or r == 0:
            continue
        rows = order[first:last]
        low, high = int(rows[0]), int(rows[-1]) + 1
        if high - low == last - first:
            yield slot, slice(low, high), r, factors[slot]
        else:
            for part in rows.split(_GATHER):
                yield slot, part, r, factors[slot]


def take(t: Tensor, rows: Rows) -> Tensor:
    return t[rows] if isinstance(rows, slice) else t.index_select(0, rows)


def _add_product(y: Tensor, rows: Rows, left: Tensor, right: Tensor, scaling: float) -> None:
    if isinstance(rows, slice):
        library.addmm_(y[rows], left, right, scaling)
    else:
        y.index_add_(0, rows, library.mm(left, right), alpha=scaling)


def row_scaled(h_rows: Tensor, row_scales: Tensor | None, rows: Rows) -> Tensor:
    if row_scales is None:
        return h_rows
    wide = torch.promote_types(h_rows.dtype, torch.float32)
    return (h_rows * row_scales[rows, None].to(wide)).to(h_rows.dtype)


def zeros_wide(like: Tensor) -> Tensor:
    return like.new_zeros(like.shape, dtype=torch.promote_types(like.dtype, torch.float32))
