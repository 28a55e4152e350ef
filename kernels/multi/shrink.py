"""The narrow half for rows of different adapters: ``h[t] = x[t] @ a[adapter of t].T``.

x (T, K), a (S, R, K) or in pages, h (T, R); of a packed projection every slice has its own R
columns of h. Rows of none and ranks that an adapter has not get 0. Beside h, on request, each row
times its factor, rounded once from the float32 sum.

A program takes one adapter's rows among BM sorted ones, so an adapter is read once for BM of its
rows, whatever else is in the batch, and x in its natural order. Moves e * (TK + n R K) bytes, n the
adapters present. Sums run over K in parts of PART, added in order: few rows get a program a part
(SPLIT: h is float32, a part after the other), for want of programs, and the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastlora.kernels.multi.adapters import factors_of, numbered, places, ranks_of, sorted_tile
from fastlora.kernels.multi.batch import KernelAdapters, KernelRows, rows_grid
from fastlora.kernels.tile.configs import Shrink, rank_block
from fastlora.kernels.tile.launch import compiled_as, device_of
from fastlora.kernels.tile.numerics import dot, narrow, precision

# Columns of K a part: at K = 4096 four programs share a row, and each waits for the memory four
# times instead of sixteen. By arithmetic; part of what a sum's bits depend on.
PART = 1024


@triton.jit
def _multi_shrink(
    p_x, p_a, p_h, p_scaled, p_order, p_ids, p_scalings, p_ranks, p_row_scales, p_table,
    T, K, R, S, pages, tiles, parts, split,
    s_x_t, s_x_k, s_a_slot, s_a_slice, s_a_r, s_a_k, s_h_part, s_h_t, s_table,
    BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, PART: tl.constexpr,
    RANKS: tl.constexpr, ROW_SCALES: tl.constexpr, TABLE: tl.constexpr, PAGE: tl.constexpr,
    SCALED: tl.constexpr, OVERLAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # The product beside may start as soon as every program here has: it waits before it reads h.
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    rows, slots, number = sorted_tile(p_order, p_ids, tl.program_id(0), T, S, BM)
    place = tl.program_id(2)
    ranks = place % tiles * BR + tl.arange(0, BR)
    part, which = place // tiles % split, place // tiles // split
    last = tl.where(split > 1, part + 1, parts)
    p_a += which.to(tl.int64) * s_a_slice
    o_x = rows[:, None] * s_x_t
    columns = which * R + ranks
    o_h = part.to(tl.int64) * s_h_part + rows[:, None] * s_h_t + columns[None, :]
    turn = tl.program_id(1)
    slot = numbered(slots, number, turn, S)
    while slot < S:
        mine = slots == slot
        r = ranks_of(p_ranks, slot, R, RANKS)
        o_rank, m_rank = places(
            p_table, slot, ranks, ranks < r, pages, s_table, s_a_slot, s_a_r, TABLE, PAGE
        )
        # Nothing to sum where the adapter has none of these ranks.
        end = tl.where(place % tiles * BR < r, K, 0)
        b_sum = tl.zeros([BM, BR], tl.float32)
        for first_part in range(part * PART, last * PART, PART):
            acc = tl.zeros([BM, BR], tl.float32)
            for first in range(first_part, tl.minimum(first_part + PART, end), BK):
                inner = first + tl.arange(0, BK)
                m_x = mine[:, None] & (inner[None, :] < K)
                m_a = (inner[:, None] < K) & m_rank[None, :]
                o_inner = inner.to(tl.int64)
                b_x = tl.load(p_x + o_x + o_inner[None, :] * s_x_k, mask=m_x, other=0.0)
                o_a = o_rank[None, :] + o_inner[:, None] * s_a_k
                b_a = tl.load(p_a + o_a, mask=m_a, other=0.0)  # [BK, BR]
                acc = dot(b_x, narrow(b_a, b_x.dtype), acc, PRECISION)
            b_sum += acc
        m_h = mine[:, None] & (ranks < R)[None, :]
        tl.store(p_h + o_h, narrow(b_sum, p_h.dtype.element_ty), mask=m_h)
        if SCALED:
            own = tl.where(mine, slot, -1)
            b_factors = factors_of(p_scalings, p_row_scales, own, r, rows, ROW_SCALES)
            b_scaled = narrow(b_sum * b_factors[:, None], p_h.dtype.element_ty)
            tl.store(p_scaled + o_h, b_scaled, mask=m_h)
        turn += tl.num_programs(1)
        slot = numbered(slots, number, turn, S)


def multi_shrink(
    x: torch.Tensor,
    adapters: KernelAdapters,
    rows: KernelRows,
    h: torch.Tensor,
    config: Shrink,
    *,
    slices: int = 1,
    scaled: torch.Tensor | None = None,
    overlap: bool = False,
) -> None:
    """Fills h (T, slices * R), or h (parts, T, slices * R) in float32; both of unit column stride.

    scaled: what takes each row of h times its factor, like h, without parts.
    """
    (T, K), S, R = x.shape, adapters.S, adapters.R
    if h.numel() == 0:
        return
    parts = parts_of(K)
    split = parts if h.dim() == 3 else 1
    s_part = h.stride(0) if h.dim() == 3 else 0
    # Beside a in two dtypes there are registers for half as many.
    BR = rank_block(R, 32 if adapters.a.dtype != x.dtype else 64)
    tiles = triton.cdiv(R, BR)
    table, pages, s_table = adapters.pages
    grid = *rows_grid(T, S, config.BM), slices * split * tiles
    with device_of(x):
        _multi_shrink[grid](
            x, adapters.a, h, h if scaled is None else scaled, rows.order, *rows.pointers, table,
            T, K, R, S, pages, tiles, parts, split,
            *x.stride(), *adapters.a_strides, s_part, h.stride(-2), s_table,
            BM=config.BM, BK=config.BK, BR=BR, PART=PART, **rows.flags, **adapters.form,
            SCALED=scaled is not None, OVERLAP=overlap, PRECISION=precision(x.dtype),
            **compiled_as(config),
        )  # fmt: skip


def parts_of(K: int) -> int:
    """How many parts a sum over K has, at least one."""
    return max(1, triton.cdiv(K, PART))
