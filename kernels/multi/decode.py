"""The base product of few rows with every row's own adapter: ``y[t] = x[t] @ w + s_t h[t] @ b``.

x (T, K), w (K, N), h from ``multi_shrink``, usually in parts; b (S, R, N) or in pages; s_t is the
adapter's scaling times the row's own; biases, one rounding. Of a packed projection every slice of
columns has its own R columns of h.

w streams through once a tile of rows; meanwhile the shrink runs beside (programmatic dependent
launch), whose h is waited for after the K loop. Then a row at a time takes its own adapter's b, a
rank after the other: no tile of other adapters, so nothing of theirs enters a row's sum, and
ranks cost what they are. Moves e * (KN + T (K + N)) bytes for the product and e * n R (K + N) for
n adapters, of which T R N come through L2. Computes 2 T N (K + R) flops: bound by reading w.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastlora.kernels.multi.adapters import factors_of, load_h, places, ranks_of, slice_of, slots_of
from fastlora.kernels.multi.batch import KernelAdapters, KernelRows
from fastlora.kernels.multi.expand import tiles_of
from fastlora.kernels.tile.configs import Decode, rank_tile
from fastlora.kernels.tile.launch import compiled_as, device_of
from fastlora.kernels.tile.numerics import narrow, precision
from fastlora.kernels.tile.steps import base_steps

# Elements of b whose loads a thread has under way at a time, in tiles of up to 32 rows and of more:
# twice as many spill where operands have no alignment.
_FEW_ROWS, _MORE_ROWS = 64, 32


@triton.jit
def _multi_decode(
    p_x, p_w, p_b, p_y, p_h, p_out, p_bias, p_ids, p_scalings, p_ranks, p_row_scales, p_table,
    T, K, R, S, pages, ends,
    s_x_t, s_x_k, s_w_k, s_w_n, s_y_t, s_y_n, s_h_part, s_h_t, s_b_slot, s_b_r, s_b_n, s_out,
    s_table,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
    RANKS: tl.constexpr, ROW_SCALES: tl.constexpr, TABLE: tl.constexpr, PAGE: tl.constexpr,
    PARTS: tl.constexpr, BIAS: tl.constexpr, OVERLAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    which, begin, end, first_column = slice_of(tl.program_id(1), ends, BN)
    columns = first_column + tl.arange(0, BN)
    acc = tl.zeros([BM, BN], tl.float32)
    acc = base_steps(
        acc, p_x, p_w, rows, columns, T, end, K, s_x_t, s_x_k, s_w_k, s_w_n, BK, PRECISION
    )
    slots = slots_of(p_ids, rows, rows < T, S)
    b_ranks = ranks_of(p_ranks, slots, R, RANKS)
    b_factors = factors_of(p_scalings, p_row_scales, slots, b_ranks, rows, ROW_SCALES)
    o_rows = rows.to(tl.int64)[:, None]
    o_columns = columns.to(tl.int64)[None, :]
    # Of an h that comes in parts, one program writes the sum, ranks that a row has not too.
    ranks_out = tl.where(first_column == begin, R, 0)
    last = tl.maximum(tl.max(b_ranks), ranks_out) if PARTS > 1 else tl.max(b_ranks)
    # Apart from acc, which lies as tensor cores have it: moving sums there takes barriers.
    b_delta = tl.zeros([BM, BN], tl.float32)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
    for first in range(0, last, BR):
        ranks = first + tl.arange(0, BR)
        # Ranks first, so that a sum over them stays within a thread.
        o_h = rows.to(tl.int64)[None, :] * s_h_t + (which * R + ranks)[:, None]
        m_h = (rows < T)[None, :] & (ranks < R)[:, None]
        # Rounded as it is where one program sums all parts: a row's bits follow from no batch.
        b_h = narrow(load_h(p_h, o_h, m_h, s_h_part, PARTS), p_out.dtype.element_ty)  # [BR, BM]
        if PARTS > 1:
            o_out = rows.to(tl.int64)[None, :] * s_out + (which * R + ranks)[:, None]
            m_out = (rows < T)[None, :] & (ranks < ranks_out)[:, None]
            tl.store(p_out + o_out, b_h, mask=m_out)
        o_rank, m_rank = places(
            p_table, slots[None, :], ranks[:, None], ranks[:, None] < b_ranks[None, :], pages,
            s_table, s_b_slot, s_b_r, TABLE, PAGE,
        )  # fmt: skip
        m_b = m_rank[:, :, None] & (columns < end)[None, None, :]
        o_b = o_rank[:, :, None] + columns.to(tl.int64)[None, None, :] * s_b_n
        b_b = tl.load(p_b + o_b, mask=m_b, other=0.0).to(tl.float32)  # [BR, BM, BN]
        b_scaled = b_h.to(tl.float32) * b_factors[None, :]
        b_delta += tl.sum(b_scaled[:, :, None] * b_b, 0)
    acc += b_delta
    if BIAS:
        acc += tl.load(p_bias + columns, mask=columns < end, other=0.0).to(tl.float32)[None, :]
    m_y = (rows < T)[:, None] & (columns < end)[None, :]
    tl.store(p_y + o_rows * s_y_t + o_columns * s_y_n, narrow(acc, p_y.dtype.element_ty), mask=m_y)


def multi_decode(
    x: torch.Tensor,
    w: torch.Tensor,
    y: torch.Tensor,
    h: torch.Tensor,
    adapters: KernelAdapters,
    rows: KernelRows,
    ends: tuple[int, ...],
    config: Decode,
    *,
    out: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    overlap: bool = False,
) -> None:
    """Fills y (T, N); h (T, C * R), or parts of it in float32, which ``out`` takes the sum of.

    ends: of the C slices of columns, the last is N. overlap: launched while the shrink still runs.
    """
    (T, K), S, R = x.shape, adapters.S, adapters.R
    split = h.dim() == 3
    if T == 0 or (y.numel() == 0 and not split):
        return
    out = h if out is None else out
    table, pages, s_table = adapters.pages
    grid = triton.cdiv(T, config.BM), tiles_of(ends, config.BN)
    options = {"launch_pdl": True} if overlap else {}
    with device_of(x):
        _multi_decode[grid](
            x, w, adapters.b, y, h, out, y if bias is None else bias, *rows.pointers, table,
            T, K, R, S, pages, ends,
            *x.stride(), *w.stride(), *y.stride(), h.stride(0) if split else 0, h.stride(-2),
            *adapters.b.stride(), out.stride(-2), s_table,
            BM=config.BM, BN=config.BN, BK=config.BK,
            BR=ranks_at_a_time(config, R, adapters.b.itemsize), **rows.flags, **adapters.form,
            PARTS=h.shape[0] if split else 1, BIAS=bias is not None, OVERLAP=overlap,
            PRECISION=precision(x.dtype), **compiled_as(config), **options,
        )  # fmt: skip


def ranks_at_a_time(config: Decode, R: int, size: int) -> int:
    """Counts the ranks that fit the registers, at most those there are."""
    elements = (_FEW_ROWS if config.BM <= 32 else _MORE_ROWS) // (2 if size == 4 else 1)
    a_rank = config.BM * config.BN // (32 * config.warps)
    return max(1, min(elements // max(1, a_rank), rank_tile(R)))
