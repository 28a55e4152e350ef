"""The K loop of a base product's tile: ``acc += x[rows] @ w[:, columns]``, in steps of BK.

Through pointers of any stride and alignment, or through tensor descriptors of aligned rows.
"""

import triton
import triton.language as tl

from fastlora.kernels.tile.numerics import dot


@triton.jit
def base_steps(
    acc, p_x, p_w, rows, columns, M, N, K, s_x_m, s_x_k, s_w_k, s_w_n,
    BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc [BM, BN], x (M, K), w (K, N)."""
    o_x = rows.to(tl.int64)[:, None] * s_x_m
    o_w = columns.to(tl.int64)[None, :] * s_w_n
    for first in range(0, K, BK):
        inner = first + tl.arange(0, BK)
        m_x = (rows[:, None] < M) & (inner[None, :] < K)
        m_w = (inner[:, None] < K) & (columns[None, :] < N)
        o_inner = inner.to(tl.int64)
        b_x = tl.load(p_x + o_x + o_inner[None, :] * s_x_k, mask=m_x, other=0.0)  # [BM, BK]
        b_w = tl.load(p_w + o_w + o_inner[:, None] * s_w_k, mask=m_w, other=0.0)  # [BK, BN]
        acc = dot(b_x, b_w, acc, PRECISION)
    return acc


@triton.jit
def base_steps_tma(
    acc, d_x, d_w, first_row, first_column, K,
    BK: tl.constexpr, W_TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Takes the same steps through descriptors of x and of w, or of w.T where it is turned."""
    for first in range(0, K, BK):
        b_x = d_x.load([first_row, first])  # [BM, BK]
        if W_TRANSPOSED:
            b_w = d_w.load([first_column, first]).T  # [BK, BN]
        else:
            b_w = d_w.load([first, first_column])  # [BK, BN]
        acc = dot(b_x, b_w, acc, PRECISION)
    return acc
