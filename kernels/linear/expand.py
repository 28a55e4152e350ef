"""The LoRA branch's wide half alone: ``y (+)= s * keep * (h @ b) + biases``, in place.

y (M, N), h (M, R), b (R, N). For bases that are not a plain weight, whose output y is added to, and
for the library's product, which then accumulates onto y. keep is the dropout mask of an (M, N)
input, in backward. One rounding of each element.

Moves e * MN bytes written, as many read where it adds, and e * R (M + N). Computes 2 M N R flops:
bound by bandwidth up to rank 256 or so.
"""

import torch
import triton
import triton.language as tl

from fastlora.kernels.tile.configs import Expand, rank_block
from fastlora.kernels.tile.launch import Dropout, compiled_as, device_of, dropout_arguments
from fastlora.kernels.tile.numerics import narrow, precise, precision
from fastlora.kernels.tile.rank import add_biases, rank_step, scaled


@triton.jit
def _expand(
    p_y, p_h, p_b, p_bias, p_lora_bias, p_seed, M, N, R, scaling, factor, threshold,
    s_y_m, s_y_n, s_h_m, s_b_r, s_b_n,
    BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
    ADD: tl.constexpr, DROPOUT: tl.constexpr, BIAS: tl.constexpr, LORA_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    acc = tl.zeros([BM, BN], tl.float32)
    acc = rank_step(acc, p_h, p_b, rows, columns, M, N, R, s_h_m, s_b_r, s_b_n, BR, PRECISION)
    acc = scaled(acc, factor, p_seed, threshold, rows, tl.program_id(1) * BN, BM, BN, DROPOUT)
    acc = add_biases(acc, p_bias, p_lora_bias, columns, N, scaling, BIAS, LORA_BIAS)
    o_y = rows.to(tl.int64)[:, None] * s_y_m + columns.to(tl.int64)[None, :] * s_y_n
    m_y = (rows[:, None] < M) & (columns[None, :] < N)
    if ADD:
        acc += tl.load(p_y + o_y, mask=m_y, other=0.0).to(tl.float32)
    tl.store(p_y + o_y, narrow(acc, p_y.dtype.element_ty), mask=m_y)


def expand(
    y: torch.Tensor,
    h: torch.Tensor,
    b: torch.Tensor,
    scaling: float,
    config: Expand,
    *,
    add: bool,
    bias: torch.Tensor | None = None,
    lora_bias: torch.Tensor | None = None,
    drop: Dropout | None = None,
) -> None:
    """Writes y (M, N), or adds to it; h (M, R) of unit column stride, b (R, N)."""
    (M, N), R = y.shape, b.shape[0]
    if y.numel() == 0:
        return
    # Products without tensor cores hold the step in registers.
    BR = rank_block(R, 16 if precise(y.dtype) else 64)
    seed, threshold, keep_scale = dropout_arguments(drop, y)
    with device_of(y):
        _expand[(triton.cdiv(M, config.BM), triton.cdiv(N, config.BN))](
            y, h, b, y if bias is None else bias, y if lora_bias is None else lora_bias, seed,
            M, N, R, scaling, scaling * keep_scale, threshold, *y.stride(), h.stride(0),
            *b.stride(),
            BM=config.BM, BN=config.BN, BR=BR, ADD=add, DROPOUT=drop is not None,
            BIAS=bias is not None, LORA_BIAS=lora_bias is not None, PRECISION=precision(y.dtype),
            **compiled_as(config),
        )  # fmt: skip
