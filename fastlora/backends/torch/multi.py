"""The multi-adapter ops in plain torch; ``backends/torch/linear.py`` has their conventions.

A row's adapter part comes from products of its own adapter's rows alone: neighbouring rows (a
sequence) are worked on in place, scattered ones (a decode batch) gathered. Gathering all adapters'
rows at once, sorted, was no more than 3 % faster on a CPU: the small products are what takes time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from fastlora.backends.packed import add_by_slices
from fastlora.backends.torch import products as library
from fastlora.backends.torch.wide_products import adapter_gradient, alone, base_gradient, linear
from fastlora.backends.values import Adapters, Rows

# Scattered rows that are gathered at a time: bounds what is held beside y to so many rows of N.
_GATHER = 256

# Neighbours as a slice, others by index. A group: a slot, its rows, its rank, its scaling.
Places = slice | Tensor
Group = tuple[int, Places, int, float]


def group_rows(ids: Tensor, num_slots: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sorts rows by their slot: the first three of ``Rows``, of ids that are in range."""
    if ids.is_cpu:
        lowest, highest = torch.aminmax(ids) if ids.numel() else (-1, -1)
        if int(lowest) < -1 or int(highest) >= num_slots:
            bad = int(ids[(ids < -1) | (ids >= num_slots)][0])
            raise ValueError(f"adapter_ids: expected ids in [-1, {num_slots}), got {bad}")
    else:
        # Reading them would wait for the device: there an id out of range means no adapter.
        ids = ids.where((ids >= 0) & (ids < num_slots), -1)
    ids = ids.to(torch.int32, copy=True)
    in_order, order = torch.sort(ids, stable=True)
    slots = torch.arange(num_slots + 1, dtype=torch.int32, device=ids.device)
    return ids, order, torch.searchsorted(in_order, slots)


def multi_lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    adapters: Adapters,
    rows: Rows,
    invariant: bool = False,
) -> tuple[Tensor, Tensor]:
    y = linear(x, weight, bias, invariant)
    h = x.new_empty(x.shape[0], adapters.lora_A.shape[1])
    multi_lora_add_(y, h, x, adapters, rows, invariant)
    return y, h


def multi_lora_add_(
    y: Tensor, h: Tensor, x: Tensor, adapters: Adapters, rows: Rows, invariant: bool = False
) -> None:
    h.zero_()
    lora_A, lora_B, row_scales = adapters.lora_A, adapters.lora_B, rows.row_scales
    for slot, places, r, scaling in groups_of(rows, lora_A.shape[1]):
        A, B = lora_A[slot, :r].to(x.dtype).T, lora_B[slot, :, :r].to(x.dtype).T
        if invariant:
            for row in _row_numbers(places):
                h_row = alone(x, row) @ A
                h[row, :r] = h_row[0]
                h_row = scale_rows(h_row, row_scales, slice(row, row + 1))
                y[row] = alone(y, row).addmm_(h_row, B, alpha=scaling)[0]
            continue
        h_rows = library.mm(take_rows(x, places), A)
        h[places, :r] = h_rows
        h_rows = scale_rows(h_rows, row_scales, places)
        _add_product(y, places, h_rows, B, scaling)


def packed_lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    adapters: Adapters,
    rows: Rows,
    invariant: bool = False,
) -> Tensor:
    y = linear(x, weight, bias, invariant)
    packed_lora_add_(y, x, adapters, rows, invariant)
    return y


def packed_lora_add_(
    y: Tensor, x: Tensor, adapters: Adapters, rows: Rows, invariant: bool = False
) -> None:
    add_by_slices(multi_lora_add_, y, x, adapters, rows, invariant)


def multi_lora_linear_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    adapters: Adapters,
    h: Tensor,
    rows: Rows,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Gradients of (x, weight, bias, lora_A, lora_B): those that ``needs`` asks for."""
    need_x, _, _, need_A, need_B = needs
    lora_A, lora_B, row_scales = adapters.lora_A, adapters.lora_B, rows.row_scales
    dx = base_gradient(dy, x, weight) if need_x else None
    dA = new_wide_zeros(lora_A) if need_A else None
    dB = new_wide_zeros(lora_B) if need_B else None
    for slot, places, r, scaling in groups_of(rows, lora_A.shape[1]):
        dy_rows = take_rows(dy, places)
        if dx is not None or dA is not None:
            g = library.mm(dy_rows, lora_B[slot, :, :r].to(dy.dtype))
            g = scale_rows(g, row_scales, places)
            if dx is not None:
                _add_product(dx, places, g, lora_A[slot, :r].to(x.dtype), scaling)
            if dA is not None:
                dA[slot, :r] += adapter_gradient(g, take_rows(x, places), dA.dtype, scaling)
        if dB is not None:
            h_rows = scale_rows(h[places, :r], row_scales, places)
            dB[slot, :, :r] += adapter_gradient(dy_rows, h_rows, dB.dtype, scaling)
    return finish_gradients(dy, x, dx, dA, dB, adapters, needs)


def finish_gradients(
    dy: Tensor,
    x: Tensor,
    dx: Tensor | None,
    dA: Tensor | None,
    dB: Tensor | None,
    adapters: Adapters,
    needs: Sequence[bool],
) -> list[Tensor]:
    """The backward op's result: dA and dB as wide as their adapters, the base's beside them."""
    _, need_weight, need_bias, _, _ = needs
    grads = [
        dx,
        library.mm(dy.T, x) if need_weight else None,
        dy.sum(0) if need_bias else None,
        None if dA is None else dA.to(adapters.lora_A.dtype),
        None if dB is None else dB.to(adapters.lora_B.dtype),
    ]
    return [grad for grad in grads if grad is not None]


def groups_of(rows: Rows, R: int) -> Iterator[Group]:
    """The groups that have rows and a rank; scattered rows in parts of at most ``_GATHER``."""
    bounds, factors = rows.starts.tolist(), rows.scalings.tolist()
    limits = [R] * len(factors) if rows.ranks is None else rows.ranks.tolist()
    for slot, factor in enumerate(factors):
        # Before anything is written; slots that no row uses may hold whatever they like.
        if not math.isfinite(factor) and bounds[slot] < bounds[slot + 1]:
            raise ValueError(f"scalings: expected finite numbers, got {factor} for slot {slot}")
    for slot, (first, last) in enumerate(pairwise(bounds)):
        r = min(max(limits[slot], 0), R)
        if first == last or r == 0:
            continue
        places = rows.order[first:last]
        low, high = int(places[0]), int(places[-1]) + 1
        if high - low == last - first:
            yield slot, slice(low, high), r, factors[slot]
        else:
            for part in places.split(_GATHER):
                yield slot, part, r, factors[slot]


def _row_numbers(places: Places) -> Sequence[int]:
    return range(places.start, places.stop) if isinstance(places, slice) else places.tolist()


def take_rows(t: Tensor, places: Places) -> Tensor:
    return t[places] if isinstance(places, slice) else t.index_select(0, places)


def _add_product(y: Tensor, places: Places, left: Tensor, right: Tensor, scaling: float) -> None:
    if isinstance(places, slice):
        library.addmm_(y[places], left, right, scaling)
    else:
        y.index_add_(0, places, library.mm(left, right), alpha=scaling)


def scale_rows(h_rows: Tensor, row_scales: Tensor | None, places: Places) -> Tensor:
    if row_scales is None:
        return h_rows
    wide = torch.promote_types(h_rows.dtype, torch.float32)
    return (h_rows * row_scales[places, None].to(wide)).to(h_rows.dtype)


def new_wide_zeros(like: Tensor) -> Tensor:
    return like.new_zeros(like.shape, dtype=torch.promote_types(like.dtype, torch.float32))
