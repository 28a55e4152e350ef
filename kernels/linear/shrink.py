"""The LoRA branch's narrow half: ``h = dropout(x) @ a.T``, for backward ``g = dy @ b``.

x (M, K), a (R, K), h (M, R) in x's dtype; beside it, on request, ``factor * h`` rounded once from
the float32 sum, which is what a rank step that comes last takes into the tensor cores.

Moves e * MK bytes of x, once if R fits one tile, and e * RK of a for every BM rows (from L2).
Computes 2 M K R flops: bound by bandwidth. Every program sums its rows over all of K in one order,
so the result does not depend on the grid. With dropout: 7 Philox rounds for 8 elements of x.
"""

import torch
import triton
import triton.language as tl

from fastlora.kernels.tile.configs import Shrink, rank_block
from fastlora.kernels.tile.launch import Dropout, compiled_as, device_of, dropout_arguments
from fastlora.kernels.tile.numerics import dot, narrow, precision
from fastlora.kernels.tile.philox import keep_tile


@triton.jit
def _shrink(
    p_x, p_a, p_h, p_scaled, p_seed, M, K, R, factor, threshold, keep_scale,
    s_x_m, s_x_k, s_a_r, s_a_k, s_h_m,
    BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
    DROPOUT: tl.constexpr, SCALED: tl.constexpr, OVERLAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # The product beside may start as soon as every program here has: it waits before it reads h.
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    ranks = tl.program_id(1) * BR + tl.arange(0, BR)
    o_x = rows.to(tl.int64)[:, None] * s_x_m
    o_a = ranks.to(tl.int64)[None, :] * s_a_r
    acc = tl.zeros([BM, BR], tl.float32)
    for first in range(0, K, BK):
        inner = first + tl.arange(0, BK)
        m_x = (rows[:, None] < M) & (inner[None, :] < K)
        m_a = (inner[:, None] < K) & (ranks[None, :] < R)
        o_inner = inner.to(tl.int64)
        b_x = tl.load(p_x + o_x + o_inner[None, :] * s_x_k, mask=m_x, other=0.0)  # [BM, BK]
        b_a = tl.load(p_a + o_a + o_inner[:, None] * s_a_k, mask=m_a, other=0.0)  # [BK, BR]
        if DROPOUT:
            b_keep = keep_tile(tl.load(p_seed), rows, first // 8, threshold, BM, BK // 8)
            b_x = tl.where(b_keep, b_x, 0.0)
        acc = dot(b_x, narrow(b_a, b_x.dtype), acc, PRECISION)
    acc = acc * keep_scale
    o_h = rows.to(tl.int64)[:, None] * s_h_m + ranks[None, :]
    m_h = (rows[:, None] < M) & (ranks[None, :] < R)
    tl.store(p_h + o_h, narrow(acc, p_h.dtype.element_ty), mask=m_h)
    if SCALED:
        tl.store(p_scaled + o_h, narrow(acc * factor, p_h.dtype.element_ty), mask=m_h)


def shrink(
    x: torch.Tensor,
    a: torch.Tensor,
    h: torch.Tensor,
    config: Shrink,
    *,
    scaled: torch.Tensor | None = None,
    factor: float = 1.0,
    drop: Dropout | None = None,
    overlap: bool = False,
) -> None:
    """Fills h (M, R), and ``scaled`` with ``factor * h``; both of unit column stride."""
    (M, K), R = x.shape, a.shape[0]
    if h.numel() == 0:
        return
    BR = rank_block(R)
    seed, threshold, keep_scale = dropout_arguments(drop, h)
    with device_of(x):
        _shrink[(triton.cdiv(M, config.BM), triton.cdiv(R, BR))](
            x, a, h, h if scaled is None else scaled, seed,
            M, K, R, factor, threshold, keep_scale, *x.stride(), *a.stride(), h.stride(0),
            BM=config.BM, BK=config.BK, BR=BR, DROPOUT=drop is not None,
            SCALED=scaled is not None, OVERLAP=overlap, PRECISION=precision(x.dtype),
            **compiled_as(config),
        )  # fmt: skip
