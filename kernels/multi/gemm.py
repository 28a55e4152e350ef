"""The base product of many rows with every row's own adapter: ``y[t] = x[t] @ w + s_t h[t] @ b``.

x (T, K) in its natural order, w (K, N), h (T, R) from ``multi_shrink``, b (S, R, N) or in pages;
biases, one rounding. Of a packed projection every slice of columns has its own R columns of h.

After the K loop a tile walks its own rows' adapters, in ascending order, found in their ids: for
each it takes the K steps of its ranks, with the h of all other rows zero. So a tile of one sequence
takes one adapter's steps, and nothing is sorted, gathered or scattered but in the shrink. h is
scaled already; in float16, whose range a scaled h may exceed, the steps come first and the factors
are applied to their sum. Moves e * (KN + T (K + N)) and e * R (T + n N) bytes, n the adapters, as
the product alone but for h and b. Computes 2 T N K flops and 2 BM BN R more for every adapter of a
tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastlora.kernels.linear.gemm import descriptors
from fastlora.kernels.multi.adapters import adapter_steps, factors_of, ranks_of, slice_of, slots_of
from fastlora.kernels.multi.batch import KernelAdapters, KernelRows
from fastlora.kernels.multi.expand import tiles_of
from fastlora.kernels.tile.configs import Gemm, rank_block
from fastlora.kernels.tile.launch import compiled_as, device_of
from fastlora.kernels.tile.numerics import narrow, precise, precision
from fastlora.kernels.tile.rank import tile_among
from fastlora.kernels.tile.steps import base_steps, base_steps_tma


@triton.jit
def _multi_gemm(
    p_x, p_w, p_y, p_h, p_b, p_bias, p_ids, p_scalings, p_ranks, p_row_scales, p_table,
    T, K, R, S, pages, across, ends,
    s_x_t, s_x_k, s_w_k, s_w_n, s_y_t, s_y_n, s_h_t, s_b_slot, s_b_r, s_b_n, s_table,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, GROUP: tl.constexpr,
    RANKS: tl.constexpr, ROW_SCALES: tl.constexpr, TABLE: tl.constexpr, PAGE: tl.constexpr,
    FIRST: tl.constexpr, BIAS: tl.constexpr, OVERLAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row, column = tile_among(tl.program_id(0), tl.cdiv(T, BM), across, GROUP)
    rows = row * BM + tl.arange(0, BM)
    which, _, end, first_column = slice_of(column, ends, BN)
    columns = first_column + tl.arange(0, BN)
    p_h += which.to(tl.int64) * R
    slots = slots_of(p_ids, rows, rows < T, S)
    b_ranks = ranks_of(p_ranks, slots, R, RANKS)
    acc = tl.zeros([BM, BN], tl.float32)
    if FIRST:
        if OVERLAP:
            tl.extra.cuda.gdc_wait()
        acc = adapter_steps(
            acc, p_h, p_b, p_table, slots, b_ranks, rows, columns, end, R, S, pages,
            s_h_t, s_b_slot, s_b_r, s_b_n, s_table, BR, TABLE, PAGE, PRECISION,
        )  # fmt: skip
        acc *= factors_of(p_scalings, p_row_scales, slots, b_ranks, rows, ROW_SCALES)[:, None]
    acc = base_steps(
        acc, p_x, p_w, rows, columns, T, end, K, s_x_t, s_x_k, s_w_k, s_w_n, BK, PRECISION
    )
    if not FIRST:
        if OVERLAP:
            tl.extra.cuda.gdc_wait()
        acc = adapter_steps(
            acc, p_h, p_b, p_table, slots, b_ranks, rows, columns, end, R, S, pages,
            s_h_t, s_b_slot, s_b_r, s_b_n, s_table, BR, TABLE, PAGE, PRECISION,
        )  # fmt: skip
    if BIAS:
        acc += tl.load(p_bias + columns, mask=columns < end, other=0.0).to(tl.float32)[None, :]
    o_y = rows.to(tl.int64)[:, None] * s_y_t + columns.to(tl.int64)[None, :] * s_y_n
    m_y = (rows < T)[:, None] & (columns < end)[None, :]
    tl.store(p_y + o_y, narrow(acc, p_y.dtype.element_ty), mask=m_y)


@triton.jit
def _multi_gemm_tma(
    d_x, d_w, d_y, p_h, p_b, p_bias, p_ids, p_scalings, p_ranks, p_row_scales, p_table,
    T, K, R, S, pages, across, ends, s_h_t, s_b_slot, s_b_r, s_b_n, s_table,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, GROUP: tl.constexpr,
    W_TRANSPOSED: tl.constexpr,
    RANKS: tl.constexpr, ROW_SCALES: tl.constexpr, TABLE: tl.constexpr, PAGE: tl.constexpr,
    FIRST: tl.constexpr, BIAS: tl.constexpr, OVERLAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    for tile in tl.range(tl.program_id(0), tl.cdiv(T, BM) * across, tl.num_programs(0)):
        row, column = tile_among(tile, tl.cdiv(T, BM), across, GROUP)
        rows = row * BM + tl.arange(0, BM)
        which, _, end, first_column = slice_of(column, ends, BN)
        columns = first_column + tl.arange(0, BN)
        p_h_slice = p_h + which.to(tl.int64) * R
        slots = slots_of(p_ids, rows, rows < T, S)
        b_ranks = ranks_of(p_ranks, slots, R, RANKS)
        acc = tl.zeros([BM, BN], tl.float32)
        if FIRST:
            if OVERLAP:
                tl.extra.cuda.gdc_wait()
            acc = adapter_steps(
                acc, p_h_slice, p_b, p_table, slots, b_ranks, rows, columns, end, R, S, pages,
                s_h_t, s_b_slot, s_b_r, s_b_n, s_table, BR, TABLE, PAGE, PRECISION,
            )  # fmt: skip
            acc *= factors_of(p_scalings, p_row_scales, slots, b_ranks, rows, ROW_SCALES)[:, None]
        acc = base_steps_tma(acc, d_x, d_w, row * BM, first_column, K, BK, W_TRANSPOSED, PRECISION)
        if not FIRST:
            if OVERLAP:
                tl.extra.cuda.gdc_wait()
            acc = adapter_steps(
                acc, p_h_slice, p_b, p_table, slots, b_ranks, rows, columns, end, R, S, pages,
                s_h_t, s_b_slot, s_b_r, s_b_n, s_table, BR, TABLE, PAGE, PRECISION,
            )  # fmt: skip
        if BIAS:
            acc += tl.load(p_bias + columns, mask=columns < end, other=0.0).to(tl.float32)[None, :]
        d_y.store([row * BM, first_column], narrow(acc, d_y.dtype))


def multi_gemm(
    x: torch.Tensor,
    w: torch.Tensor,
    y: torch.Tensor,
    h: torch.Tensor,
    adapters: KernelAdapters,
    rows: KernelRows,
    ends: tuple[int, ...],
    config: Gemm,
    *,
    tma: bool,
    programs: int,
    first: bool,
    bias: torch.Tensor | None = None,
    overlap: bool = False,
) -> None:
    """Fills y (T, N); h (T, C * R) of unit column stride, scaled unless ``first``.

    ends: of the C slices of columns, the last is N. tma: only where ``gemm.fits_tma`` and
    ``ends_fit``. overlap: launched while the shrink that fills h still runs.
    """
    (T, K), S, R = x.shape, adapters.S, adapters.R
    if y.numel() == 0:
        return
    across = tiles_of(ends, config.BN)
    tiles = triton.cdiv(T, config.BM) * across
    table, pages, s_table = adapters.pages
    operands = (h, adapters.b, y if bias is None else bias, *rows.pointers, table)
    numbers = (T, K, R, S, pages, across, ends)
    strides = (h.stride(0), *adapters.b.stride(), s_table)
    options = {
        "BM": config.BM, "BN": config.BN, "BK": config.BK, "GROUP": config.GROUP,
        "BR": rank_block(R, 16 if precise(x.dtype) or adapters.table is not None else 32),
        **rows.flags, **adapters.form, "FIRST": first, "BIAS": bias is not None,
        "OVERLAP": overlap, "PRECISION": precision(x.dtype), **compiled_as(config),
    }  # fmt: skip
    if overlap:
        options["launch_pdl"] = True
    with device_of(x):
        if tma:
            d_x, d_w, d_y, turned = descriptors(x, w, y, config)
            _multi_gemm_tma[(min(tiles, programs),)](
                d_x, d_w, d_y, *operands, *numbers, *strides, W_TRANSPOSED=turned, **options
            )
        else:
            _multi_gemm[(tiles,)](
                x, w, y, *operands, *numbers,
                *x.stride(), *w.stride(), *y.stride(), *strides, **options,
            )  # fmt: skip


def ends_fit(ends: tuple[int, ...], BN: int) -> bool:
    """Whether whole tiles may be stored: one that passes its slice's end would meet the next's."""
    return all(end % BN == 0 for end in ends[:-1])
