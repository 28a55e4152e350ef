"""Every op in plain torch: the backend ``"torch"``, on any device.

Lean rather than naive: the base product is one library GEMM, the LoRA part is accumulated onto it
in place, so the only M*N tensor is the result and no N*K tensor is made. Adapters of a wider dtype
are narrowed to x's for the products (the library accumulates in float32), never x widened;
gradients of float32 adapters on a half-precision x are summed in float32 over blocks of rows.

All operands are matrices of any strides: x (M, K), weight (N, K), lora_A (R, K), lora_B (N, R),
h = dropout(x) @ lora_A.T (M, R), which forward leaves for backward. Many adapters: A (S, R, K) and
B (S, N, R).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as nnf

from fastlora import dropout
from fastlora.exact import merge_, unmerge_

__all__ = [
    "group_rows",
    "lora_add_",
    "lora_linear",
    "lora_linear_backward",
    "merge_",
    "multi_lora_add_",
    "multi_lora_linear",
    "multi_lora_linear_backward",
    "unmerge_",
]

Rows = slice | Tensor

# Elements that are widened or masked at a time. On a CPU the block's float32 copy (1 MiB) should
# stay in a core's L2 cache; elsewhere few launches matter more (not measured on a GPU).
_CPU_BLOCK, _BLOCK = 1 << 18, 1 << 24
# Rows of one adapter that lie apart are gathered this many at a time: bounds the extra rows of N.
_GATHER = 256


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    lora_bias: Tensor | None,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    y = nnf.linear(x, weight, bias)
    h = x.new_empty(x.shape[0], lora_A.shape[0])
    lora_add_(y, h, x, lora_A, lora_B, lora_bias, scaling, dropout_p, seed)
    return y, h


def lora_add_(
    y: Tensor,
    h: Tensor,
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    lora_bias: Tensor | None,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
) -> None:
    A, B = lora_A.to(x.dtype), lora_B.to(x.dtype)
    if seed is None:
        torch.mm(x, A.T, out=h)
    else:
        for rows in _row_blocks(x):
            torch.mm(dropout.dropped(x[rows], dropout_p, seed, rows.start), A.T, out=h[rows])
    y.addmm_(h, B.T, alpha=scaling)
    if lora_bias is not None:
        y.add_(lora_bias, alpha=scaling)


def lora_linear_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    h: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Gradients of (x, weight, bias, lora_A, lora_B, lora_bias): those that ``needs`` asks for."""
    need_x, need_weight, need_bias, need_A, need_B, need_lora_bias = needs
    dx = _base_gradient(dy, x, weight) if need_x else None
    dA = None
    if need_x or need_A:
        g = (dy @ lora_B.to(dy.dtype)).mul_(scaling)  # [M, R]
        if seed is not None:
            dA = _through_dropout(dx, g, x, lora_A, need_A, dropout_p, seed)
        else:
            if dx is not None:
                dx.addmm_(g, lora_A.to(x.dtype))
            dA = _adapter_gradient(g, x, lora_A.dtype) if need_A else None
    wide = torch.promote_types(dy.dtype, torch.float32)
    grads = [
        dx,
        dy.T @ x if need_weight else None,
        dy.sum(0) if need_bias else None,
        dA,
        _adapter_gradient(dy, h * scaling, lora_B.dtype) if need_B else None,
        dy.sum(0, dtype=wide).mul_(scaling).to(lora_B.dtype) if need_lora_bias else None,
    ]
    return [grad for grad in grads if grad is not None]


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
    order: Tensor,
    starts: Tensor,
    scalings: Tensor,
    ranks: Tensor | None,
    row_scales: Tensor | None,
) -> tuple[Tensor, Tensor]:
    y = nnf.linear(x, weight, bias)
    h = x.new_empty(x.shape[0], lora_A.shape[1])
    multi_lora_add_(y, h, x, lora_A, lora_B, order, starts, scalings, ranks, row_scales)
    return y, h


def multi_lora_add_(
    y: Tensor,
    h: Tensor,
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    order: Tensor,
    starts: Tensor,
    scalings: Tensor,
    ranks: Tensor | None,
    row_scales: Tensor | None,
) -> None:
    h.zero_()
    for slot, rows, r, scaling in _groups(order, starts, scalings, ranks, lora_A.shape[1]):
        h_rows = _take(x, rows) @ lora_A[slot, :r].to(x.dtype).T
        h[rows, :r] = h_rows
        h_rows.mul_(_row_factor(h, row_scales, rows, scaling))
        _add_product(y, rows, h_rows, lora_B[slot, :, :r].to(x.dtype).T)


def multi_lora_linear_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    h: Tensor,
    order: Tensor,
    starts: Tensor,
    scalings: Tensor,
    ranks: Tensor | None,
    row_scales: Tensor | None,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Gradients of (x, weight, bias, lora_A, lora_B): those that ``needs`` asks for."""
    need_x, need_weight, need_bias, need_A, need_B = needs
    dx = _base_gradient(dy, x, weight) if need_x else None
    dA = _zeros_wide(lora_A) if need_A else None
    dB = _zeros_wide(lora_B) if need_B else None
    for slot, rows, r, scaling in _groups(order, starts, scalings, ranks, lora_A.shape[1]):
        factor = _row_factor(h, row_scales, rows, scaling)
        dy_rows = _take(dy, rows)
        if dx is not None or dA is not None:
            g = (dy_rows @ lora_B[slot, :, :r].to(dy.dtype)).mul_(factor)
            if dx is not None:
                _add_product(dx, rows, g, lora_A[slot, :r].to(x.dtype))
            if dA is not None:
                dA[slot, :r] += _adapter_gradient(g, _take(x, rows), dA.dtype)
        if dB is not None:
            h_rows = (h[rows, :r] * factor).to(h.dtype)
            dB[slot, :, :r] += _adapter_gradient(dy_rows, h_rows, dB.dtype)
    grads = [
        dx,
        dy.T @ x if need_weight else None,
        dy.sum(0) if need_bias else None,
        None if dA is None else dA.to(lora_A.dtype),
        None if dB is None else dB.to(lora_B.dtype),
    ]
    return [grad for grad in grads if grad is not None]


def _groups(
    order: Tensor, starts: Tensor, scalings: Tensor, ranks: Tensor | None, R: int
) -> Iterator[tuple[int, Rows, int, float]]:
    """(slot, its rows, its rank, its scaling): neighbouring rows as one slice, others by index."""
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


def _take(t: Tensor, rows: Rows) -> Tensor:
    return t[rows] if isinstance(rows, slice) else t.index_select(0, rows)


def _add_product(y: Tensor, rows: Rows, left: Tensor, right: Tensor) -> None:
    if isinstance(rows, slice):
        y[rows].addmm_(left, right)
    else:
        y.index_add_(0, rows, left @ right)


def _row_factor(like: Tensor, scales: Tensor | None, rows: Rows, scaling: float) -> float | Tensor:
    """What rows of h are multiplied by; wide, so that the product is rounded and it is not."""
    if scales is None:
        return scaling
    return scales[rows, None].to(torch.promote_types(like.dtype, torch.float32)) * scaling


def _row_blocks(x: Tensor) -> Iterator[slice]:
    size = _CPU_BLOCK if x.device.type == "cpu" else _BLOCK
    step = max(1, size // max(1, x.shape[1]))
    for first in range(0, x.shape[0], step):
        yield slice(first, min(first + step, x.shape[0]))


def _base_gradient(dy: Tensor, x: Tensor, weight: Tensor | None) -> Tensor:
    return dy @ weight if weight is not None else x.new_zeros(x.shape)


def _zeros_wide(like: Tensor) -> Tensor:
    return like.new_zeros(like.shape, dtype=torch.promote_types(like.dtype, torch.float32))


def _adapter_gradient(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """``left.T @ right`` in ``dtype``, accumulated in float32 or wider."""
    if dtype == right.dtype:
        return left.T @ right
    wide = _accumulator(dtype, right.dtype)
    total = right.new_zeros(left.shape[1], right.shape[1], dtype=wide)
    for rows in _row_blocks(right if right.shape[1] > left.shape[1] else left):
        total.addmm_(left[rows].T.to(wide), right[rows].to(wide))
    return total.to(dtype)


def _through_dropout(
    dx: Tensor | None,
    g: Tensor,
    x: Tensor,
    lora_A: Tensor,
    need_A: bool,
    dropout_p: float,
    seed: Tensor,
) -> Tensor | None:
    """Adds ``mask * (g @ lora_A)`` to dx and returns ``g.T @ (mask * x)``, one mask for both."""
    A, scale = lora_A.to(x.dtype), dropout.keep_scale(dropout_p)
    wide = _accumulator(lora_A.dtype, x.dtype)
    total = lora_A.new_zeros(lora_A.shape, dtype=wide) if need_A else None
    for rows in _row_blocks(x):
        x_rows, g_rows = x[rows], g[rows]
        keep = dropout.keep_mask(x_rows.shape[0], x.shape[1], dropout_p, seed, rows.start)
        if dx is not None:
            dx[rows] += (g_rows @ A).mul_(keep).mul_(scale)
        if total is not None:
            total.addmm_(g_rows.T.to(wide), x_rows.mul(keep).to(wide), alpha=scale)
    return None if total is None else total.to(lora_A.dtype)


def _accumulator(*dtypes: torch.dtype) -> torch.dtype:
    wide = torch.float32
    for dtype in dtypes:
        wide = torch.promote_types(wide, dtype)
    return wide
