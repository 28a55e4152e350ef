"""Every adapter's gradient: ``out[s] = scaling_s * sum over its rows of (r_t * h[t]).T x[t]``.

x (T, C), h (T, R), out (S, R, C) of any strides; r_t a row's own scale. For lora_A: x is the
layer's input, h the gradient ``g = dy @ lora_B``; for lora_B: x is dy, h what forward kept, out is
lora_B's transposed. Ranks that an adapter has not, and adapters without rows, get 0.

A program sums all rows of one adapter, in the batch's order, for BC columns: what else is in the
batch changes nothing. Moves e * (TC + T R C / BC) and the gradients; computes 2 T C R flops: bound
by bandwidth where the adapters times C / BC are enough programs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastlora.kernels.multi.adapters import ranks_of
from fastlora.kernels.multi.batch import KernelRows
from fastlora.kernels.tile.configs import Gradient, rank_block
from fastlora.kernels.tile.launch import compiled_as, device_of
from fastlora.kernels.tile.numerics import dot, narrow, precise, precision


@triton.jit
def _multi_gradient(
    p_x, p_h, p_out, p_order, p_starts, p_scalings, p_ranks, p_row_scales,
    C, R, s_x_t, s_x_c, s_h_t, s_o_slot, s_o_r, s_o_c,
    BM: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr,
    RANKS: tl.constexpr, ROW_SCALES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(0)
    columns = tl.program_id(1) * BC + tl.arange(0, BC)
    ranks = tl.program_id(2) * BR + tl.arange(0, BR)
    r = ranks_of(p_ranks, slot, R, RANKS)
    begin, end = tl.load(p_starts + slot).to(tl.int32), tl.load(p_starts + slot + 1).to(tl.int32)
    end = tl.where(tl.program_id(2) * BR < r, end, begin)
    acc = tl.zeros([BC, BR], tl.float32)
    for first in range(begin, end, BM):
        positions = first + tl.arange(0, BM)
        rows = tl.load(p_order + positions, mask=positions < end, other=0).to(tl.int64)
        m_x = (positions < end)[:, None] & (columns < C)[None, :]
        m_h = (positions < end)[:, None] & (ranks < r)[None, :]
        o_x = rows[:, None] * s_x_t + columns.to(tl.int64)[None, :] * s_x_c
        b_x = tl.load(p_x + o_x, mask=m_x, other=0.0)  # [BM, BC]
        b_h = tl.load(p_h + rows[:, None] * s_h_t + ranks[None, :], mask=m_h, other=0.0)
        if ROW_SCALES:
            b_scales = tl.load(p_row_scales + rows, mask=positions < end, other=0.0).to(tl.float32)
            b_h = narrow(b_h.to(tl.float32) * b_scales[:, None], b_x.dtype)  # [BM, BR]
        acc = dot(tl.trans(b_x), b_h, acc, PRECISION)
    if begin < end:
        acc *= tl.load(p_scalings + slot).to(tl.float32)
    p_out += slot.to(tl.int64) * s_o_slot
    o_out = columns.to(tl.int64)[:, None] * s_o_c + ranks.to(tl.int64)[None, :] * s_o_r
    m_out = (columns < C)[:, None] & (ranks < R)[None, :]
    b_out = tl.where((ranks < r)[None, :], acc, 0.0)
    tl.store(p_out + o_out, narrow(b_out, p_out.dtype.element_ty), mask=m_out)


def multi_gradient(
    x: torch.Tensor,
    h: torch.Tensor,
    out: torch.Tensor,
    rows: KernelRows,
    starts: torch.Tensor,
    config: Gradient,
) -> None:
    """Fills out (S, R, C); h (T, R) of unit column stride."""
    S, R, C = out.shape
    if out.numel() == 0:
        return
    # Products without tensor cores hold their operands in registers.
    BR = rank_block(R, 32 if precise(x.dtype) else 64)
    _, *pointers = rows.pointers
    with device_of(x):
        _multi_gradient[(S, triton.cdiv(C, config.BC), triton.cdiv(R, BR))](
            x, h, out, rows.order, starts, *pointers,
            C, R, *x.stride(), h.stride(0), *out.stride(),
            BM=config.BM, BC=config.BC, BR=BR, **rows.flags, PRECISION=precision(x.dtype),
            **compiled_as(config),
        )  # fmt: skip
