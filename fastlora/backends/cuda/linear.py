"""One adapter on the CUDA kernels: which of them run a product, and when none does.

Taken: float16 and bfloat16 with adapters of the same or float32; K, N, R and strides multiples of
8, addresses of 16 bytes. Forward and the gradient for x are one product, in which the factors
change places; the adapters' own gradients are the next backend's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastlora.backends import dropout, native
from fastlora.backends.cuda.call import (
    SMALL,
    Follow,
    chunks,
    halves,
    pointer,
    stream_of,
)
from fastlora.kernels.tile.gpu import arch_of, device_of

# As csrc/fastlora.h numbers them.
ONE_PASS, TILE_64, TILE_128, TILE_256 = range(4)
# By arithmetic, unmeasured: each 32 rows read the weight again and every block its h's factors,
# from L2, which beyond these rows takes longer than a second launch; with more than 32 ranks at
# fewer; where shared memory is small a tile of 16 rows is all that fits. From 66 tiles on, half of
# an H100's multiprocessors, a wider tile pays.
FEW_ROWS, FEWER_ROWS, MANY_TILES = 32, 16, 66
MOST_RANKS, MOST_RANKS_BESIDE = 512, 64


class _Dropped(NamedTuple):
    seed: Tensor
    p: float
    of_x: bool  # else of the LoRA term


def lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor,
    lora_bias: Tensor | None, scaling: float, dropout_p: float, seed: Tensor | None, *,
    follow: Follow, path: str | None = None, invariant: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    drop = None if seed is None else _Dropped(seed, dropout_p, True)
    reason = _refused(x, weight, lora_A, lora_B, lora_A, drop, path)
    if invariant:
        reason = "a batch-invariant product is asked for"
    if reason is not None:
        how = {"invariant": True} if invariant else {}
        rest = (lora_bias, scaling, dropout_p, seed)
        return follow(reason, x, lora_A)(x, weight, bias, lora_A, lora_B, *rest, **how)
    return _product(x, weight, bias, lora_A, lora_B, lora_bias, scaling, drop, path, False)


def lora_linear_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, lora_A: Tensor, lora_B: Tensor, h: Tensor,
    scaling: float, dropout_p: float, seed: Tensor | None, needs: Sequence[bool], *,
    follow: Follow, path: str | None = None,
) -> list[Tensor]:  # fmt: skip
    """Gradients of (x, weight, bias, lora_A, lora_B, lora_bias): those that ``needs`` asks for."""
    drop = None if seed is None else _Dropped(seed, dropout_p, False)
    reason = _refused(dy, weight, lora_B.T, lora_A.T, lora_B, drop, path) if needs[0] else None
    needs, grads = list(needs), []
    if needs[0] and reason is None and weight is not None:
        given = (dy, weight, None, lora_B, lora_A, None, scaling, drop, path, True)
        grads.append(_product(*given)[0])
        needs[0] = False
    if any(needs):
        rest = (dy, x, weight, lora_A, lora_B, h, scaling, dropout_p, seed, tuple(needs))
        grads += follow(reason, x, lora_A)(*rest)
    return grads


def _refused(
    x: Tensor, weight: Tensor | None, a: Tensor, b: Tensor, lora: Tensor, drop: _Dropped | None,
    path: str | None,
) -> str | None:  # fmt: skip
    """Why the product with h = x a.T (a (R, K)) and b (N, R) is not taken, or None when it is."""
    if weight is None:
        return "there is no base weight"
    # Side by side in memory are the columns of lora_A (R, K) and lora_B (N, R), whatever they are.
    a, b = (a, b) if a is lora else (a.T, b.T)
    reason = halves(x, a, b) or chunks("x", x) or chunks("weight", weight)
    reason = reason or chunks("lora_A", a) or chunks("lora_B", b)
    R = lora.shape[0] if a is lora else lora.shape[1]
    if reason is None and MOST_RANKS < R:
        reason = f"rank {R} is beyond {MOST_RANKS}"
    if reason is None and weight.shape[0] % 8:
        reason = "weight has sizes that are no multiples of 8"
    if reason is None and not (x.numel() and weight.numel() and R):
        reason = "there is nothing to multiply"
    if reason is None and path == "cuda_one_pass" and not _fits_one_pass(x, lora, R, drop):
        reason = "it cannot run in one pass"
    if reason is None and path == "cuda_overlapped" and arch_of(x.device) < 90:
        reason = "kernels run beside each other from Hopper on"
    return reason


def _fits_one_pass(x: Tensor, lora: Tensor, R: int, drop: _Dropped | None) -> bool:
    # One tile of 32 rows, or more than a grid has rows of blocks for, would not fit.
    rows = FEWER_ROWS if arch_of(x.device) in SMALL else 1 << 20
    fits = R <= MOST_RANKS_BESIDE and x.shape[0] <= rows
    return lora.dtype == x.dtype and drop is None and fits


def tile_of(M: int, N: int, arch: int) -> int:
    """The tile of a product of many rows."""
    if -(-M // 128) * -(-N // 128) < MANY_TILES:
        return TILE_64
    small = arch in SMALL or -(-M // 256) * -(-N // 128) < MANY_TILES
    return TILE_128 if small else TILE_256


def _product(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor,
    lora_bias: Tensor | None, scaling: float, drop: _Dropped | None, path: str | None,
    transposed: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y and h; a and b are lora_A and lora_B, or with ``transposed`` lora_B and lora_A."""
    M, K = x.shape
    N, R = (weight.shape[1], a.shape[1]) if transposed else (weight.shape[0], a.shape[0])
    y, h = x.new_empty(M, N), x.new_empty(M, R)
    arch = arch_of(x.device)
    most = FEWER_ROWS if R > 32 else FEW_ROWS
    few = most >= M and _fits_one_pass(x, a, R, drop)
    if path == "cuda_one_pass" or (path is None and few):
        number = ONE_PASS
    else:
        number = tile_of(M, N, arch)
    overlap = path == "cuda_overlapped" or (path is None and arch >= 90)
    # A scaled h may overflow in float16; sums that are masked must be the rank step's alone.
    last = number != ONE_PASS and x.dtype == torch.bfloat16 and (drop is None or drop.of_x)
    scaled = torch.empty_like(h) if last else None
    bias, lora_bias = (None if t is None else t.contiguous() for t in (bias, lora_bias))
    with device_of(x):
        code = native.cuda_functions().fastlora_cuda_lora_linear(
            y.data_ptr(), y.stride(0), h.data_ptr(), pointer(scaled),
            x.data_ptr(), _ld(x), weight.data_ptr(), _ld(weight), pointer(bias),
            a.data_ptr(), _ld(a), b.data_ptr(), _ld(b), pointer(lora_bias),
            M, K, N, R, scaling,
            None if drop is None else drop.seed.data_ptr(),
            0 if drop is None else dropout.threshold(drop.p),
            1.0 if drop is None else dropout.keep_scale(drop.p),
            drop is None or drop.of_x, transposed, number, overlap,
            native.DTYPES[x.dtype], native.DTYPES[a.dtype], stream_of(x),
        )  # fmt: skip
    native.check(code, "lora_linear")
    return y, h


def _ld(t: Tensor) -> int:
    return t.stride(0) if t.shape[0] > 1 else t.shape[1]
