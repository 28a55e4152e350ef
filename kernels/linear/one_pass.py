"""The whole layer in one pass, for few rows: ``y = x @ w + s * keep * (h @ b) + biases``.

x (M, K), w (K, N), a (R, K), b (R, N), ``h = dropout(x) @ a.T``. Forward: w = weight.T, a =
lora_A, b = lora_B.T; backward for x: w = weight, a = lora_B.T, b = lora_A, and keep
masks y, not x.
x is read once: xw and xa are summed in the same K loop, the rank step and the biases come before
the single rounding. Without w it adds the LoRA part alone to y.

Moves e * (KN + MK * N / BN + MN) bytes, w from memory, x and a for every tile of columns from L2:
bound by reading w while M is small. Computes 2 M K (N + R * N / BN) flops, which is what makes it
wrong for many rows: h is computed again in every tile of columns, (1 + R / BN) times the product.
"""

import torch
import triton
import triton.language as tl

from fastlora.kernels.tile.configs import OnePass, rank_tile
from fastlora.kernels.tile.launch import Dropout, compiled_as, device_of, dropout_arguments
from fastlora.kernels.tile.numerics import dot, narrow, precision
from fastlora.kernels.tile.philox import keep_tile
from fastlora.kernels.tile.rank import add_biases, scaled


@triton.jit
def _one_pass(
    p_x, p_w, p_a, p_b, p_y, p_h, p_bias, p_lora_bias, p_seed,
    M, N, K, R, scaling, threshold, keep_scale,
    s_x_m, s_x_k, s_w_k, s_w_n, s_a_r, s_a_k, s_b_r, s_b_n, s_y_m, s_y_n, s_h_m,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
    WEIGHT: tl.constexpr, DROPS_X: tl.constexpr, DROPS_Y: tl.constexpr,
    BIAS: tl.constexpr, LORA_BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    ranks = tl.arange(0, BR)
    o_x = rows.to(tl.int64)[:, None] * s_x_m
    o_w = columns.to(tl.int64)[None, :] * s_w_n
    o_a = ranks.to(tl.int64)[None, :] * s_a_r
    acc = tl.zeros([BM, BN], tl.float32)
    acc_h = tl.zeros([BM, BR], tl.float32)
    for first in range(0, K, BK):
        inner = first + tl.arange(0, BK)
        o_inner = inner.to(tl.int64)
        m_x = (rows[:, None] < M) & (inner[None, :] < K)
        m_a = (inner[:, None] < K) & (ranks[None, :] < R)
        b_x = tl.load(p_x + o_x + o_inner[None, :] * s_x_k, mask=m_x, other=0.0)  # [BM, BK]
        b_a = tl.load(p_a + o_a + o_inner[:, None] * s_a_k, mask=m_a, other=0.0)  # [BK, BR]
        if WEIGHT:
            m_w = (inner[:, None] < K) & (columns[None, :] < N)
            b_w = tl.load(p_w + o_w + o_inner[:, None] * s_w_k, mask=m_w, other=0.0)  # [BK, BN]
            acc = dot(b_x, b_w, acc, PRECISION)
        if DROPS_X:
            b_keep = keep_tile(tl.load(p_seed), rows, first // 8, threshold, BM, BK // 8)
            b_x = tl.where(b_keep, b_x, 0.0)
        acc_h = dot(b_x, narrow(b_a, b_x.dtype), acc_h, PRECISION)
    if DROPS_X:
        acc_h = acc_h * keep_scale
    b_h = narrow(acc_h, p_h.dtype.element_ty)  # [BM, BR]
    m_h = (rows[:, None] < M) & (ranks[None, :] < R)
    if tl.program_id(1) == 0:
        tl.store(p_h + rows.to(tl.int64)[:, None] * s_h_m + ranks[None, :], b_h, mask=m_h)

    m_b = (ranks[:, None] < R) & (columns[None, :] < N)
    o_b = ranks.to(tl.int64)[:, None] * s_b_r + columns.to(tl.int64)[None, :] * s_b_n
    b_b = tl.load(p_b + o_b, mask=m_b, other=0.0)  # [BR, BN]
    b_delta = dot(b_h, narrow(b_b, b_h.dtype), tl.zeros([BM, BN], tl.float32), PRECISION)
    factor = scaling * keep_scale if DROPS_Y else scaling
    first_column = tl.program_id(1) * BN
    acc += scaled(b_delta, factor, p_seed, threshold, rows, first_column, BM, BN, DROPS_Y)
    acc = add_biases(acc, p_bias, p_lora_bias, columns, N, scaling, BIAS, LORA_BIAS)
    o_y = rows.to(tl.int64)[:, None] * s_y_m + columns.to(tl.int64)[None, :] * s_y_n
    m_y = (rows[:, None] < M) & (columns[None, :] < N)
    if not WEIGHT:
        acc += tl.load(p_y + o_y, mask=m_y, other=0.0).to(tl.float32)
    tl.store(p_y + o_y, narrow(acc, p_y.dtype.element_ty), mask=m_y)


def one_pass(
    x: torch.Tensor,
    w: torch.Tensor | None,
    a: torch.Tensor,
    b: torch.Tensor,
    y: torch.Tensor,
    h: torch.Tensor,
    scaling: float,
    config: OnePass,
    *,
    bias: torch.Tensor | None = None,
    lora_bias: torch.Tensor | None = None,
    drop: Dropout | None = None,
    drops_x: bool = True,
) -> None:
    """Fills h (M, R) and y (M, N), or adds to y where w is None; drops from x, else from y."""
    (M, K), N, R = x.shape, y.shape[1], a.shape[0]
    if y.numel() == 0 and h.numel() == 0:
        return
    seed, threshold, keep_scale = dropout_arguments(drop, y)
    dropped = drop is not None
    with device_of(x):
        _one_pass[(triton.cdiv(M, config.BM), max(1, triton.cdiv(N, config.BN)))](
            x, x if w is None else w, a, b, y, h,
            y if bias is None else bias, y if lora_bias is None else lora_bias, seed,
            M, N, K, R, scaling, threshold, keep_scale, *x.stride(),
            *((0, 0) if w is None else w.stride()), *a.stride(), *b.stride(), *y.stride(),
            h.stride(0),
            BM=config.BM, BN=config.BN, BK=config.BK, BR=rank_tile(R), WEIGHT=w is not None,
            DROPS_X=dropped and drops_x, DROPS_Y=dropped and not drops_x,
            BIAS=bias is not None, LORA_BIAS=lora_bias is not None, PRECISION=precision(x.dtype),
            **compiled_as(config),
        )  # fmt: skip
