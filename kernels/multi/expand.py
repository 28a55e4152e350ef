"""The wide half for rows of different adapters, onto any output: ``y[t] += s_t * h[t] @ b``.

y (T, N), h (T, R), b (S, R, N) or in pages; s_t is the adapter's scaling times the row's own. Of a
packed projection every slice of y's columns has its own R columns of h. One rounding.

A program takes one adapter's rows among BM sorted ones and BN columns: it reads and writes no
other row, so those of none are left alone, and a row's bits do not depend on the batch. Moves
2 e TN bytes and e n R N, n the adapters present. Computes 2 T R N flops: bound by bandwidth.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import triton
import triton.language as tl

from fastlora.kernels.multi.adapters import (
    factors_of,
    load_h,
    numbered,
    places,
    ranks_of,
    slice_of,
    sorted_tile,
)
from fastlora.kernels.multi.batch import KernelAdapters, KernelRows, rows_grid
from fastlora.kernels.tile.configs import Expand, rank_block
from fastlora.kernels.tile.launch import compiled_as, device_of
from fastlora.kernels.tile.numerics import dot, narrow, precise, precision


@triton.jit
def _multi_expand(
    p_y, p_h, p_b, p_out, p_order, p_ids, p_scalings, p_ranks, p_row_scales, p_table,
    T, R, S, pages, ends,
    s_y_t, s_y_n, s_h_part, s_h_t, s_b_slot, s_b_r, s_b_n, s_out, s_table,
    BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
    RANKS: tl.constexpr, ROW_SCALES: tl.constexpr, TABLE: tl.constexpr, PAGE: tl.constexpr,
    PARTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    rows, slots, number = sorted_tile(p_order, p_ids, tl.program_id(0), T, S, BM)
    which, begin, end, first_column = slice_of(tl.program_id(2), ends, BN)
    columns = first_column + tl.arange(0, BN)
    DTYPE: tl.constexpr = p_y.dtype.element_ty
    o_y = rows[:, None] * s_y_t + columns.to(tl.int64)[None, :] * s_y_n
    # Of an h that comes in parts, one program writes the sum, ranks that the adapter has not too.
    ranks_out = tl.where(first_column == begin, R, 0)
    turn = tl.program_id(1)
    slot = numbered(slots, number, turn, S)
    while slot < S:
        mine = slots == slot
        r = ranks_of(p_ranks, slot, R, RANKS)
        # An adapter without ranks leaves its rows as they are.
        m_y = mine[:, None] & (columns < tl.where(r > 0, end, 0))[None, :]
        b_y = tl.load(p_y + o_y, mask=m_y, other=0.0).to(tl.float32)  # [BM, BN]
        acc = tl.zeros([BM, BN], tl.float32)
        for first in range(0, tl.maximum(r, ranks_out) if PARTS > 1 else r, BR):
            ranks = first + tl.arange(0, BR)
            o_h = rows[:, None] * s_h_t + (which * R + ranks)[None, :]
            # Up to R, whose steps the compiler knows: past r the shrink has written zeros.
            m_h = mine[:, None] & (ranks < R)[None, :]
            b_h = narrow(load_h(p_h, o_h, m_h, s_h_part, PARTS), DTYPE)  # [BM, BR]
            if PARTS > 1:
                o_out = rows[:, None] * s_out + (which * R + ranks)[None, :]
                tl.store(p_out + o_out, b_h, mask=mine[:, None] & (ranks < ranks_out)[None, :])
            o_rank, m_rank = places(
                p_table, slot, ranks, ranks < r, pages, s_table, s_b_slot, s_b_r, TABLE, PAGE
            )
            o_b = o_rank[:, None] + columns.to(tl.int64)[None, :] * s_b_n
            m_b = m_rank[:, None] & (columns < end)[None, :]
            b_b = tl.load(p_b + o_b, mask=m_b, other=0.0)  # [BR, BN]
            acc = dot(b_h, narrow(b_b, DTYPE), acc, PRECISION)
        own = tl.where(mine, slot, -1)
        b_factors = factors_of(p_scalings, p_row_scales, own, r, rows, ROW_SCALES)
        tl.store(p_y + o_y, narrow(acc * b_factors[:, None] + b_y, DTYPE), mask=m_y)
        turn += tl.num_programs(1)
        slot = numbered(slots, number, turn, S)


def multi_expand(
    y: torch.Tensor,
    h: torch.Tensor,
    adapters: KernelAdapters,
    rows: KernelRows,
    ends: tuple[int, ...],
    config: Expand,
    *,
    out: torch.Tensor | None = None,
) -> None:
    """Adds to y (T, N); h (T, C * R), or parts of it in float32, which ``out`` takes the sum of.

    ends: of the C slices of y's columns, the last is N.
    """
    (T, N), S, R = y.shape, adapters.S, adapters.R
    split = h.dim() == 3
    if h.numel() == 0 or (N == 0 and not split):
        return
    out = h if out is None else out
    # Less where registers hold more: without tensor cores, or b in float32.
    wide = adapters.b.itemsize == 4
    BR = rank_block(R, 16 if precise(y.dtype) else 32 if wide else 64)
    table, pages, s_table = adapters.pages
    tiles = tiles_of(ends, config.BN)
    grid = *rows_grid(T, S, config.BM), tiles
    with device_of(y):
        _multi_expand[grid](
            y, h, adapters.b, out, rows.order, *rows.pointers, table,
            T, R, S, pages, ends,
            *y.stride(), h.stride(0) if split else 0, h.stride(-2), *adapters.b.stride(),
            out.stride(-2), s_table,
            BM=config.BM, BN=config.BN, BR=BR, **rows.flags, **adapters.form,
            PARTS=h.shape[0] if split else 1, PRECISION=precision(y.dtype), **compiled_as(config),
        )  # fmt: skip


def tiles_of(ends: tuple[int, ...], BN: int) -> int:
    """How many tiles of columns the slices have, none across an end; one at least."""
    widths = (end - begin for begin, end in pairwise((0, *ends)))
    return max(1, sum(triton.cdiv(width, BN) for width in widths))
