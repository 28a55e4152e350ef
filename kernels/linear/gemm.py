"""The base product with the rank step inside: ``y = x @ w + s * keep * (h @ b) + biases``.

x (M, K), w (K, N), h (M, R), b (R, N). Forward: w = weight.T, b = lora_B.T. Backward for x: w =
weight, b = lora_A, and keep is the dropout mask of x. One rounding, of the finished sum.

Moves what the product alone moves, e * (MK + KN + MN) bytes, plus h and b, e * R * (M + N).
Computes 2 M N (K + R) flops: the rank step is ceil(R / 16) of the K / 16 + ceil(R / 16) tensor-core
steps of a tile. It comes last, by when a shrink kernel that runs beside this one (programmatic
dependent launch) has h ready, and takes h scaled already; under dropout it comes first, so that the
mask and the factor meet the LoRA term alone, and in float16 too, whose range a scaled h may exceed.

x, w and y are pointers of any stride and alignment, or, with ``TMA``, tensor descriptors: from
Hopper on, in a persistent grid, of aligned rows and unit column strides.
"""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from fastlora.kernels.tile.configs import Gemm, rank_block
from fastlora.kernels.tile.launch import Dropout, compiled_as, device_of, dropout_arguments
from fastlora.kernels.tile.numerics import narrow, precise, precision
from fastlora.kernels.tile.rank import add_biases, rank_step, scaled, tile_of
from fastlora.kernels.tile.steps import base_steps, base_steps_tma


@triton.jit
def _gemm(
    x, w, y, p_h, p_b, p_bias, p_lora_bias, p_seed,
    M, N, K, R, scaling, factor, threshold,
    s_x_m, s_x_k, s_w_k, s_w_n, s_y_m, s_y_n, s_h_m, s_b_r, s_b_n,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, GROUP: tl.constexpr,
    TMA: tl.constexpr, W_TRANSPOSED: tl.constexpr,
    FIRST: tl.constexpr, DROPOUT: tl.constexpr, BIAS: tl.constexpr, LORA_BIAS: tl.constexpr,
    OVERLAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    for tile in tl.range(tl.program_id(0), tl.cdiv(M, BM) * tl.cdiv(N, BN), tl.num_programs(0)):
        row, column = tile_of(tile, M, N, BM, BN, GROUP)
        rows, columns = row * BM + tl.arange(0, BM), column * BN + tl.arange(0, BN)
        rank_operands = (p_h, p_b, rows, columns, M, N, R, s_h_m, s_b_r, s_b_n)
        acc = tl.zeros([BM, BN], tl.float32)
        if FIRST:
            acc = _rank_step(acc, *rank_operands, BR, OVERLAP, PRECISION)
            acc = scaled(acc, factor, p_seed, threshold, rows, column * BN, BM, BN, DROPOUT)
        if TMA:
            acc = base_steps_tma(acc, x, w, row * BM, column * BN, K, BK, W_TRANSPOSED, PRECISION)
        else:
            acc = base_steps(
                acc, x, w, rows, columns, M, N, K, s_x_m, s_x_k, s_w_k, s_w_n, BK, PRECISION
            )
        if not FIRST:
            acc = _rank_step(acc, *rank_operands, BR, OVERLAP, PRECISION)
        acc = add_biases(acc, p_bias, p_lora_bias, columns, N, scaling, BIAS, LORA_BIAS)
        if TMA:
            y.store([row * BM, column * BN], narrow(acc, y.dtype))
        else:
            o_y = rows.to(tl.int64)[:, None] * s_y_m + columns.to(tl.int64)[None, :] * s_y_n
            m_y = (rows[:, None] < M) & (columns[None, :] < N)
            tl.store(y + o_y, narrow(acc, y.dtype.element_ty), mask=m_y)


@triton.jit
def _rank_step(
    acc, p_h, p_b, rows, columns, M, N, R, s_h_m, s_b_r, s_b_n,
    BR: tl.constexpr, OVERLAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The rank step, once a shrink that runs beside this kernel has written h."""
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
    return rank_step(acc, p_h, p_b, rows, columns, M, N, R, s_h_m, s_b_r, s_b_n, BR, PRECISION)


def gemm(
    x: torch.Tensor,
    w: torch.Tensor,
    y: torch.Tensor,
    h: torch.Tensor,
    b: torch.Tensor,
    scaling: float,
    config: Gemm,
    *,
    tma: bool,
    programs: int,
    first: bool,
    bias: torch.Tensor | None = None,
    lora_bias: torch.Tensor | None = None,
    drop: Dropout | None = None,
    overlap: bool = False,
) -> None:
    """Fills y (M, N); h (M, R) of unit column stride.

    first: the rank step comes first and multiplies by scaling; else h holds it already. tma: only
    where ``fits_tma``. overlap: launched while the shrink that fills h still runs.
    """
    (M, K), N, R = x.shape, y.shape[1], b.shape[0]
    if y.numel() == 0:
        return
    if drop is not None and not first:
        raise ValueError("drop: expected first=True, the mask must not meet the base product")
    seed, threshold, keep_scale = dropout_arguments(drop, y)
    tiles = triton.cdiv(M, config.BM) * triton.cdiv(N, config.BN)
    vectors = (y if bias is None else bias, y if lora_bias is None else lora_bias)
    numbers = (M, N, K, R, scaling, scaling * keep_scale, threshold)
    rank = (h.stride(0), *b.stride())
    BR = rank_block(R, most_ranks(config, x.dtype, b.dtype))
    options = {
        "BM": config.BM, "BN": config.BN, "BK": config.BK, "GROUP": config.GROUP,
        "BR": BR, "FIRST": first, "DROPOUT": drop is not None,
        "BIAS": bias is not None, "LORA_BIAS": lora_bias is not None, "OVERLAP": overlap,
        "PRECISION": precision(x.dtype), **compiled_as(config),
    }  # fmt: skip
    if overlap:
        options["launch_pdl"] = True
    with device_of(x):
        if tma:
            *matrices, turned = descriptors(x, w, y, config)
            grid, strides = (min(tiles, programs),), (None,) * 6
        else:
            # Not persistent: its tiles are small enough for several programs an SM.
            matrices, turned = (x, w, y), False
            grid, strides = (tiles,), (*x.stride(), *w.stride(), *y.stride())
        _gemm[grid](
            *matrices, h, b, *vectors, seed, *numbers, *strides, *rank,
            TMA=tma, W_TRANSPOSED=turned, **options,
        )  # fmt: skip


def descriptors(
    x: torch.Tensor, w: torch.Tensor, y: torch.Tensor, config: Gemm
) -> tuple[TensorDescriptor, TensorDescriptor, TensorDescriptor, bool]:
    """Makes those of x, w and y in the config's tiles, w's of w.T where that one's rows are whole.

    The last value says whether they are.
    """
    turned = w.stride(0) == 1
    rows, tile = (w.T, [config.BN, config.BK]) if turned else (w, [config.BK, config.BN])
    d_x = TensorDescriptor.from_tensor(x, [config.BM, config.BK])
    d_y = TensorDescriptor.from_tensor(y, [config.BM, config.BN])
    return d_x, TensorDescriptor.from_tensor(rows, tile), d_y, turned


def most_ranks(config: Gemm, dtype: torch.dtype, lora_dtype: torch.dtype) -> int:
    """Ranks a step at most: more of b beside the sums would spill registers."""
    if precise(dtype):
        return 16
    return 64 if config.BM * config.BN < 128 * 256 and lora_dtype == dtype else 32


def fits_tma(x: torch.Tensor, w: torch.Tensor, y: torch.Tensor) -> bool:
    """Whether tensor descriptors can stand for them: 16-byte rows of unit column stride.

    w may be turned, as weight.T is: its rows are read and the tile transposed.
    """
    return all(_fits(t) for t in (x, w.T if w.stride(0) == 1 else w, y))


def _fits(t: torch.Tensor) -> bool:
    row, column = t.stride()
    aligned = t.data_ptr() % 16 == 0 and row * t.itemsize % 16 == 0
    return aligned and column == 1 and row > 0 and t.numel() > 0
