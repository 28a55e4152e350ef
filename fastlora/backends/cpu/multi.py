"""Several adapters in one batch on the native CPU kernels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastlora.backends import native
from fastlora.backends.cpu.linear import (
    few,
    flat,
    gradient,
    matrix,
    pointer,
    product,
    readable,
    unit_columns,
    writable,
    written,
)
from fastlora.backends.packed import in_use, slices_of, unshared
from fastlora.backends.torch import multi as reference
from fastlora.backends.torch import products as library
from fastlora.backends.torch.wide_products import base_gradient, linear


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
    routing = (ids, order, starts, scalings, ranks, row_scales)
    if invariant and not readable(weight):
        return reference.multi_lora_linear(x, weight, bias, lora_A, lora_B, *routing, invariant)
    M, N = x.shape[0], weight.shape[0]
    h = x.new_empty(M, lora_A.shape[1])
    if invariant or few(M, weight):
        y = x.new_empty(M, N)
        run_multi(y, h, x, weight, bias, lora_A, lora_B, *routing)
        return y, h
    y = product(x, weight, bias)
    multi_lora_add_(y, h, x, lora_A, lora_B, *routing)
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
    to_y, to_h = writable(y), writable(h)
    routing = (ids, order, starts, scalings, ranks, row_scales)
    run_multi(to_y, to_h, x, None, None, lora_A, lora_B, *routing)
    written((y, to_y), (h, to_h))


def run_multi(
    y: Tensor,
    h: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    ids: Tensor,
    order: Tensor,
    starts: Tensor,
    scalings: Tensor,
    ranks: Tensor | None,
    row_scales: Tensor | None,
    table: Tensor | None = None,
) -> None:
    """With a table adapters lie in pages: A of unit K, B (P, N, page) of unit N. h is None then."""
    if table is None:
        A, B, (S, R) = unit_columns(lora_A), unit_columns(lora_B), lora_A.shape[:2]
        pages, ldb = (None, 0, 0, 0), B.stride(1)
    else:
        A, B, table = lora_A, lora_B, flat(table, torch.int32)
        (S, width), (P, page) = table.shape, A.shape[:2]
        R, ldb = width * page, B.stride(2)
        pages = (table.data_ptr(), width, P, page)
    x = unit_columns(x)
    bias = None if bias is None else unit_columns(bias)
    scalings, row_scales = flat(scalings, torch.float32), flat(row_scales, torch.float32)
    order, starts = flat(order, torch.int64), flat(starts, torch.int64)
    if ranks is not None and ranks.dtype != torch.int32:
        ranks = ranks.clamp(0, R)
    ranks = flat(ranks, torch.int32)
    (M, N), K = y.shape, x.shape[1]
    if order.numel() != M or starts.numel() != S + 1 or scalings.numel() != S:
        raise ValueError(
            f"adapter_ids: expected an order of {M} rows and starts of {S} slots, got "
            f"{order.numel()} and {starts.numel() - 1}"
        )
    code = native.functions().fastlora_multi_lora_linear(
        y.data_ptr(), y.stride(0), *matrix(h), x.data_ptr(), x.stride(0),
        *matrix(weight), pointer(bias), A.data_ptr(), A.stride(0), A.stride(1), B.data_ptr(),
        B.stride(0), ldb, order.data_ptr(), starts.data_ptr(), scalings.data_ptr(),
        pointer(ranks), pointer(row_scales), M, K, N, R, S, *pages,
        native.DTYPES[x.dtype], native.DTYPES[A.dtype], torch.get_num_threads(),
    )  # fmt: skip
    if code == native.NOT_FINITE:
        used = (starts[1:] > starts[:-1]).tolist()
        slot = next(s for s, f in enumerate(scalings.tolist()) if used[s] and not math.isfinite(f))
        raise ValueError(
            f"scalings: expected finite numbers, got {float(scalings[slot])} for slot {slot}"
        )
    native.check(code, "multi_lora_linear")


def packed_lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, *packed: Any, invariant: bool = False
) -> Tensor:
    if readable(weight) if invariant else few(x.shape[0], weight):
        y = x.new_empty(x.shape[0], weight.shape[0])
        run_packed(y, x, weight, bias, *packed)
        return y
    y = (linear if invariant else product)(x, weight, bias, invariant)
    packed_lora_add_(y, x, *packed, invariant=invariant)
    return y


def packed_lora_add_(y: Tensor, x: Tensor, *packed: Any, invariant: bool = False) -> None:
    to_y, ends = writable(y), packed[3]
    run_packed(to_y, unshared(x, y) if len(ends) > 1 else x, None, None, *packed)
    written((y, to_y))


def run_packed(
    y: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    table: Tensor | None,
    ends: Sequence[int],
    ids: Tensor,
    order: Tensor,
    starts: Tensor,
    scalings: Tensor,
    ranks: Tensor | None,
    row_scales: Tensor | None,
) -> None:
    """A slice after the other, pages where they lie; y has unit columns."""
    if table is not None and not (unit(lora_A, 2) and unit(lora_B, 1)):
        lying = (lora_A, lora_B, table, len(ends), starts, scalings, ranks)
        lora_A, lora_B, starts, scalings, ranks = in_use(*lying)
        table = None
    R = lora_B.shape[2]
    h = x.new_empty(x.shape[0], R) if table is None else None
    rest = (ids, order, starts, scalings, ranks, row_scales, table)
    if len(ends) == 1:
        return run_multi(y, h, x, weight, bias, lora_A, lora_B, *rest)
    for part in slices_of(ends, R):
        columns = slice(part.begin, part.end)
        base = None if weight is None else weight[columns]
        own = None if bias is None else bias[columns]
        A, B = lora_A[:, part.first : part.last], lora_B[:, columns]
        run_multi(y[:, columns], h, x, base, own, A, B, *rest)
    return None


def unit(t: Tensor, dim: int) -> bool:
    return t.stride(dim) == 1 or t.shape[dim] < 2


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
    g = dy.new_empty(dy.shape[0], lora_A.shape[1])
    if need_x or need_A:
        # dx += scaling * g @ A is multi_lora_add_ with the factors' roles exchanged, g its h.
        y, A = (g[:, :0], lora_A[:, :, :0]) if dx is None else (dx, lora_A)
        factors = lora_B.transpose(1, 2), A.transpose(1, 2)
        run_multi(y, g, dy, None, None, *factors, ids, order, starts, scalings, ranks, row_scales)
    dA = reference.zeros_wide(lora_A) if need_A else None
    dB = reference.zeros_wide(lora_B) if need_B else None
    adapters = dA is not None or dB is not None
    groups = reference.groups(order, starts, scalings, ranks, lora_A.shape[1])
    for slot, rows, r, scaling in groups if adapters else ():
        if dA is not None:
            g_rows = reference.row_scaled(g[rows, :r], row_scales, rows)
            dA[slot, :r] += gradient(g_rows, reference.take(x, rows), dA, scaling)
        if dB is not None:
            h_rows = reference.row_scaled(h[rows, :r], row_scales, rows)
            dy_rows = reference.take(dy, rows)
            dB[slot, :, :r] += gradient(h_rows, dy_rows, dB, scaling, transposed=True)
    grads = [
        dx,
        library.mm(dy.T, x) if need_weight else None,
        dy.sum(0) if need_bias else None,
        None if dA is None else dA.to(lora_A.dtype),
        None if dB is None else dB.to(lora_B.dtype),
    ]
    return [grad for grad in grads if grad is not None]
