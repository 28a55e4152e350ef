"""The rank step and the epilogue that every kernel with an output tile ends in.

Computes ``acc += h @ b`` for a tile acc [BM, BN], h [BM, R], b [R, BN], R in steps of BR, and adds
the biases. Moves a tile of h and one of b, which all tiles of a row or column share (so from L2).
b is read in its own dtype, float32 adapters of a half-precision base included, and narrowed here.
"""

import triton
import triton.language as tl

from fastlora.kernels.tile.numerics import dot, narrow
from fastlora.kernels.tile.philox import keep_tile


@triton.jit
def rank_step(
    acc, p_h, p_b, rows, columns, M, N, R, s_h_m, s_b_r, s_b_n,
    BR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc [BM, BN] plus ``h[rows] @ b[:, columns]``: h (M, R) of unit column stride, b (R, N)."""
    o_h = rows.to(tl.int64)[:, None] * s_h_m
    o_b = columns.to(tl.int64)[None, :] * s_b_n
    for first in tl.range(0, R, BR, num_stages=1):
        ranks = first + tl.arange(0, BR)
        m_h = (rows[:, None] < M) & (ranks[None, :] < R)
        m_b = (ranks[:, None] < R) & (columns[None, :] < N)
        b_h = tl.load(p_h + o_h + ranks[None, :], mask=m_h, other=0.0)  # [BM, BR]
        b_b = tl.load(p_b + o_b + ranks.to(tl.int64)[:, None] * s_b_r, mask=m_b, other=0.0)
        acc = dot(b_h, narrow(b_b, b_h.dtype), acc, PRECISION)
    return acc


@triton.jit
def scaled(
    acc, factor, p_seed, threshold, rows, first_column,
    BM: tl.constexpr, BN: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """acc [BM, BN] times factor, and zero where the LoRA branch's input was dropped."""
    acc = acc * factor
    if DROPOUT:
        b_keep = keep_tile(tl.load(p_seed), rows, first_column // 8, threshold, BM, BN // 8)
        acc = tl.where(b_keep, acc, 0.0)
    return acc


@triton.jit
def add_biases(
    acc, p_bias, p_lora_bias, columns, N, scaling,
    BIAS: tl.constexpr, LORA_BIAS: tl.constexpr,
):  # fmt: skip
    """acc [BM, BN] plus ``bias + scaling * lora_bias``, each (N,)."""
    if BIAS:
        acc += tl.load(p_bias + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    if LORA_BIAS:
        b_lora_bias = tl.load(p_lora_bias + columns, mask=columns < N, other=0.0)
        acc += scaling * b_lora_bias.to(tl.float32)[None, :]
    return acc


@triton.jit
def tile_of(index, M, N, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """Tile (row, column) number ``index``: down GROUP rows, then right, so that L2 serves both."""
    return tile_among(index, tl.cdiv(M, BM), tl.cdiv(N, BN), GROUP)


@triton.jit
def tile_among(index, down, across, GROUP: tl.constexpr):
    """Finds the tile as ``tile_of`` does, of ``down`` rows of tiles and ``across`` columns."""
    first = index // (GROUP * across) * GROUP
    height = tl.minimum(down - first, GROUP)
    within = index % (GROUP * across)
    return first + within % height, within // height
