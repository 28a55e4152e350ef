"""An adapter's gradient: ``out = s * h.T @ dropout(x)``, in float32 sums over all rows.

x (M, C), h (M, R), out (R, C) of any strides and dtype. For lora_A: x is the layer's input, h the
gradient ``g = dy @ lora_B``; for lora_B: x is dy, h what forward kept, out is lora_B's transposed.

Moves e * MC bytes of x once if R fits one tile, and e * MR of h for every BC columns (from L2).
Computes 2 M C R flops: bound by bandwidth. Rows are split into parts, so that enough programs run,
as many as the shape and the config say; ``_add_parts`` adds them in order: no atomics, always the
same bits.
"""

import torch
import triton
import triton.language as tl

from fastlora.kernels.tile.configs import Gradient, rank_block
from fastlora.kernels.tile.launch import Dropout, compiled_as, device_of, dropout_arguments
from fastlora.kernels.tile.numerics import dot, narrow, precision
from fastlora.kernels.tile.philox import keep_tile

# Programs that one launch should have: two for each SM of the largest GPUs of today, by arithmetic.
# Not the machine's own number, so that a sum has the same bits on every GPU of an architecture.
PROGRAMS = 256


@triton.jit
def _gradient(
    p_x, p_h, p_out, p_seed, M, C, R, part_rows, factor, threshold,
    s_x_m, s_x_c, s_h_m, s_o_part, s_o_r, s_o_c,
    BM: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(0) * BC + tl.arange(0, BC)
    ranks = tl.program_id(1) * BR + tl.arange(0, BR)
    part = tl.program_id(2)
    o_x = columns.to(tl.int64)[None, :] * s_x_c
    acc = tl.zeros([BC, BR], tl.float32)
    end = tl.minimum(M, (part + 1) * part_rows)
    for first in range(part * part_rows, end, BM):
        rows = first + tl.arange(0, BM)
        o_rows = rows.to(tl.int64)[:, None]
        m_x = (rows[:, None] < end) & (columns[None, :] < C)
        m_h = (rows[:, None] < end) & (ranks[None, :] < R)
        b_x = tl.load(p_x + o_x + o_rows * s_x_m, mask=m_x, other=0.0)  # [BM, BC]
        b_h = tl.load(p_h + o_rows * s_h_m + ranks[None, :], mask=m_h, other=0.0)  # [BM, BR]
        if DROPOUT:
            first_group = tl.program_id(0) * (BC // 8)
            b_keep = keep_tile(tl.load(p_seed), rows, first_group, threshold, BM, BC // 8)
            b_x = tl.where(b_keep, b_x, 0.0)
        acc = dot(tl.trans(b_x), b_h, acc, PRECISION)
    o_out = ranks.to(tl.int64)[None, :] * s_o_r + columns.to(tl.int64)[:, None] * s_o_c
    m_out = (ranks[None, :] < R) & (columns[:, None] < C)
    p_out += part.to(tl.int64) * s_o_part
    tl.store(p_out + o_out, narrow(acc * factor, p_out.dtype.element_ty), mask=m_out)


@triton.jit
def _add_parts(
    p_parts, p_out, C, R, parts, factor, s_part, s_o_r, s_o_c, BC: tl.constexpr, BR: tl.constexpr
):
    columns = tl.program_id(0) * BC + tl.arange(0, BC)
    ranks = tl.program_id(1) * BR + tl.arange(0, BR)
    mask = (ranks[:, None] < R) & (columns[None, :] < C)
    p_part = p_parts + ranks.to(tl.int64)[:, None] * C + columns[None, :]
    acc = tl.zeros([BR, BC], tl.float32)
    for _ in range(parts):
        acc += tl.load(p_part, mask=mask, other=0.0)
        p_part += s_part
    o_out = ranks.to(tl.int64)[:, None] * s_o_r + columns.to(tl.int64)[None, :] * s_o_c
    tl.store(p_out + o_out, narrow(acc * factor, p_out.dtype.element_ty), mask=mask)


def gradient(
    x: torch.Tensor,
    h: torch.Tensor,
    out: torch.Tensor,
    scaling: float,
    config: Gradient,
    *,
    drop: Dropout | None = None,
) -> None:
    """Fills out (R, C); h (M, R) of unit column stride."""
    (M, C), R = x.shape, h.shape[1]
    if out.numel() == 0:
        return
    BR = rank_block(R)
    tiles = triton.cdiv(C, config.BC) * triton.cdiv(R, BR)
    # A part of less than four steps would not fill the pipeline.
    parts = max(1, min(PROGRAMS // tiles, M // (4 * config.BM)))
    part_rows = triton.cdiv(triton.cdiv(M, parts), config.BM) * config.BM
    parts = max(1, triton.cdiv(M, part_rows)) if part_rows else 1
    seed, threshold, keep_scale = dropout_arguments(drop, x)
    factor = scaling * keep_scale
    sums = out if parts == 1 else out.new_empty(parts, R, C, dtype=torch.float32)
    strides = (0, *out.stride()) if parts == 1 else sums.stride()
    with device_of(x):
        _gradient[(triton.cdiv(C, config.BC), triton.cdiv(R, BR), parts)](
            x, h, sums, seed, M, C, R, part_rows, factor if parts == 1 else 1.0, threshold,
            *x.stride(), h.stride(0), *strides,
            BM=config.BM, BC=config.BC, BR=BR, DROPOUT=drop is not None,
            PRECISION=precision(x.dtype), **compiled_as(config),
        )  # fmt: skip
        if parts > 1:
            _add_parts[(triton.cdiv(C, 256), triton.cdiv(R, 4))](
                sums,
                out,
                C,
                R,
                parts,
                factor,
                R * C,
                *out.stride(),
                BC=256,
                BR=4,
                enable_fp_fusion=True,
            )
