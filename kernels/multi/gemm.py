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

x, w and y are pointers of any stride and alignment, or, with ``TMA``, tensor descriptors in a
persistent grid, as in ``gemm``.
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
    x, w, y, p_h, p_b, p_bias, p_ids, p_scalings, p_ranks, p_row_scales, p_table,
    T, K, R, S, pages, across, ends,
    s_x_t, s_x_k, s_w_k, s_w_n, s_y_t, s_y_n, s_h_t, s_b_slot, s_b_r, s_b_n, s_table,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, GROUP: tl.constexpr,
    TMA: tl.constexpr, W_TRANSPOSED: tl.constexpr,
    RANKS: tl.constexpr, ROW_SCALES: tl.constexpr, TABLE: tl.constexpr, PAGE: tl.constexpr,
    FIRST: tl.constexpr, BIAS: tl.constexpr, OVERLAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    program, down = tl.program_id(0), tl.cdiv(T, BM)
    # With pointers a program has one tile: a loop of one round, which the compiler takes away.
    begin, stop, step = (program, down * across, tl.num_programs(0)) if TMA else (0, 1, 1)
    for index in tl.range(begin, stop, step):
        row, column = tile_among(index if TMA else program, down, across, GROUP)
        rows = row * BM + tl.arange(0, BM)
        which, _, end, first_column = slice_of(column, ends, BN)
        columns = first_column + tl.arange(0, BN)
        p_h_slice = p_h + which.to(tl.int64) * R
        slots = slots_of(p_ids, rows, rows < T, S)
        b_ranks = ranks_of(p_ranks, slots, R, RANKS)
        rank_operands = (
            p_h_slice, p_b, p_table, slots, b_ranks, rows, columns, end, R, S, pages,
            s_h_t, s_b_slot, s_b_r, s_b_n, s_table,
        )  # fmt: skip
        acc = tl.zeros([BM, BN], tl.float32)
        if FIRST:
            acc = _adapter_steps(acc, *rank_operands, BR, TABLE, PAGE, OVERLAP, PRECISION)
            acc *= factors_of(p_scalings, p_row_scales, slots, b_ranks, rows, ROW_SCALES)[:, None]
        if TMA:
            acc = base_steps_tma(acc, x, w, row * BM, first_column, K, BK, W_TRANSPOSED, PRECISION)
        else:
            acc = base_steps(
                acc, x, w, rows, columns, T, end, K, s_x_t, s_x_k, s_w_k, s_w_n, BK, PRECISION
            )
        if not FIRST:
            acc = _adapter_steps(acc, *rank_operands, BR, TABLE, PAGE, OVERLAP, PRECISION)
        if BIAS:
            acc += tl.load(p_bias + columns, mask=columns < end, other=0.0).to(tl.float32)[None, :]
        if TMA:
            y.store([row * BM, first_column], narrow(acc, y.dtype))
        else:
            o_y = rows.to(tl.int64)[:, None] * s_y_t + columns.to(tl.int64)[None, :] * s_y_n
            m_y = (rows < T)[:, None] & (columns < end)[None, :]
            tl.store(y + o_y, narrow(acc, y.dtype.element_ty), mask=m_y)


@triton.jit
def _adapter_steps(
    acc, p_h, p_b, p_table, slots, b_ranks, rows, columns, end, R, S, pages,
    s_h_t, s_b_slot, s_b_r, s_b_n, s_table,
    BR: tl.constexpr, TABLE: tl.constexpr, PAGE: tl.constexpr,
    OVERLAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The adapters' steps, once a shrink that runs beside this kernel has written h."""
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
    return adapter_steps(
        acc, p_h, p_b, p_table, slots, b_ranks, rows, columns, end, R, S, pages,
        s_h_t, s_b_slot, s_b_r, s_b_n, s_table, BR, TABLE, PAGE, PRECISION,
    )  # fmt: skip


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
            *matrices, turned = descriptors(x, w, y, config)
            grid, of_matrices = (min(tiles, programs),), (None,) * 6
        else:
            matrices, turned = (x, w, y), False
            grid, of_matrices = (tiles,), (*x.stride(), *w.stride(), *y.stride())
        _multi_gemm[grid](
            *matrices, *operands, *numbers, *of_matrices, *strides,
            TMA=tma, W_TRANSPOSED=turned, **options,
        )  # fmt: skip


def ends_fit(ends: tuple[int, ...], BN: int) -> bool:
    """Whether whole tiles may be stored: one that passes its slice's end would meet the next's."""
    return all(end % BN == 0 for end in ends[:-1])
