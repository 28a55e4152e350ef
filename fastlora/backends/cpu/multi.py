"""Several adapters in one batch on the native CPU kernels."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastlora.backends import native
from fastlora.backends.cpu.linear import (
    few,
    finish_write,
    flat,
    gradient,
    matrix,
    pointer,
    product,
    readable,
    unit_columns,
    writable,
)
from fastlora.backends.in_place import copy_if_shared
from fastlora.backends.packed import gather_used, split_slices
from fastlora.backends.torch import multi as reference
from fastlora.backends.torch.wide_products import base_gradient, linear
from fastlora.backends.values import Adapters, Rows


def multi_lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    adapters: Adapters,
    rows: Rows,
    invariant: bool = False,
) -> tuple[Tensor, Tensor]:
    if invariant and not readable(weight):
        return reference.multi_lora_linear(x, weight, bias, adapters, rows, invariant)
    M, N = x.shape[0], weight.shape[0]
    h = x.new_empty(M, adapters.lora_A.shape[1])
    if invariant or few(M, weight, "multi_lora_linear"):
        y = x.new_empty(M, N)
        run_multi(y, h, x, weight, bias, adapters, rows)
        return y, h
    y = product(x, weight, bias, "multi_lora_linear")
    multi_lora_add_(y, h, x, adapters, rows)
    return y, h


def multi_lora_add_(
    y: Tensor, h: Tensor, x: Tensor, adapters: Adapters, rows: Rows, invariant: bool = False
) -> None:
    to_y, to_h = writable(y), writable(h)
    run_multi(to_y, to_h, x, None, None, adapters, rows)
    finish_write((y, to_y), (h, to_h))


def run_multi(
    y: Tensor,
    h: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    adapters: Adapters,
    rows: Rows,
) -> None:
    """Calls the kernel for one slice; pages want A of unit K, B of unit N, and no h."""
    A, B, table, _ = adapters
    if table is None:
        A, B, (S, R) = unit_columns(A), unit_columns(B), A.shape[:2]
        pages, ldb = (None, 0, 0, 0), B.stride(1)
    else:
        table = flat(table, torch.int32)
        (S, width), (P, page) = table.shape, A.shape[:2]
        R, ldb = width * page, B.stride(2)
        pages = (table.data_ptr(), width, P, page)
    x = unit_columns(x)
    bias = None if bias is None else unit_columns(bias)
    _, order, starts, scalings, ranks, row_scales = rows
    order, starts = flat(order, torch.int64), flat(starts, torch.int64)
    scalings, row_scales = flat(scalings, torch.float32), flat(row_scales, torch.float32)
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
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    adapters: Adapters,
    rows: Rows,
    invariant: bool = False,
) -> Tensor:
    if readable(weight) if invariant else few(x.shape[0], weight, "multi_lora_linear"):
        y = x.new_empty(x.shape[0], weight.shape[0])
        run_packed(y, x, weight, bias, adapters, rows)
        return y
    if invariant:
        y = linear(x, weight, bias, True)
    else:
        y = product(x, weight, bias, "multi_lora_linear")
    packed_lora_add_(y, x, adapters, rows)
    return y


def packed_lora_add_(
    y: Tensor, x: Tensor, adapters: Adapters, rows: Rows, invariant: bool = False
) -> None:
    to_y = writable(y)
    x = copy_if_shared(x, y) if len(adapters.ends) > 1 else x
    run_packed(to_y, x, None, None, adapters, rows)
    finish_write((y, to_y))


def run_packed(
    y: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    adapters: Adapters,
    rows: Rows,
) -> None:
    """Runs one slice after the other, pages where they lie; y has unit columns."""
    lora_A, lora_B, table, ends = adapters
    if table is not None and not (has_unit_stride(lora_A, 2) and has_unit_stride(lora_B, 1)):
        adapters, rows = gather_used(adapters, rows)
    h = x.new_empty(x.shape[0], adapters.lora_B.shape[2]) if adapters.table is None else None
    if len(ends) == 1:
        return run_multi(y, h, x, weight, bias, adapters, rows)
    for columns, part in split_slices(adapters):
        base = None if weight is None else weight[columns]
        part_bias = None if bias is None else bias[columns]
        run_multi(y[:, columns], h, x, base, part_bias, part, rows)
    return None


def has_unit_stride(t: Tensor, dim: int) -> bool:
    return t.stride(dim) == 1 or t.shape[dim] < 2


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
    g = dy.new_empty(dy.shape[0], lora_A.shape[1])
    if need_x or need_A:
        # dx += scaling * g @ A is multi_lora_add_ with the factors' roles exchanged, g its h.
        y, A = (g[:, :0], lora_A[:, :, :0]) if dx is None else (dx, lora_A)
        turned = Adapters(lora_B.transpose(1, 2), A.transpose(1, 2))
        run_multi(y, g, dy, None, None, turned, rows)
    dA = reference.new_wide_zeros(lora_A) if need_A else None
    dB = reference.new_wide_zeros(lora_B) if need_B else None
    groups = reference.groups_of(rows, lora_A.shape[1]) if need_A or need_B else ()
    for slot, places, r, scaling in groups:
        if dA is not None:
            g_rows = reference.scale_rows(g[places, :r], row_scales, places)
            dA[slot, :r] += gradient(g_rows, reference.take_rows(x, places), dA, scaling)
        if dB is not None:
            h_rows = reference.scale_rows(h[places, :r], row_scales, places)
            dy_rows = reference.take_rows(dy, places)
            dB[slot, :, :r] += gradient(h_rows, dy_rows, dB, scaling, transposed=True)
    return reference.finish_gradients(dy, x, dx, dA, dB, adapters, needs)
