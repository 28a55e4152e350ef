"""The change that adapters make to a weight, ``d = sum of scaling * B @ A``, in reproducible bits.

A library GEMM's bits depend on alignment, thread count, version and machine, because the order of
its additions does. Here nothing is rounded inside the product, so that no order matters: each
column of A and each row of ``scaling * B`` is first rounded to p bits below its own largest
element, p chosen so that a sum of R products fits the 53 bits of float64 exactly
(2 p + log2 R <= 53: p = 24 at R = 16, as many as float32 has). The float64 product is then exact
on any library, and is rounded once, to float32. After Ozaki et al., "Error-free transformations of
matrix multiplication by using fast routines of matrix multiplication" (2012).

A float64 weight wants more bits than that: there d is summed rank by rank with separate
multiplications and additions, each rounded once by IEEE 754 wherever it runs, which is slower.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Tile = tuple[slice, slice]


class Delta:
    """d for tiles of ``weight``; several adapters are added one after another."""

    def __init__(
        self,
        weight: Tensor,
        lora_A: Sequence[Tensor],
        lora_B: Sequence[Tensor],
        scalings: Sequence[float],
    ) -> None:
        self._exact = weight.dtype != torch.float64
        self._like = weight.new_empty(0, dtype=torch.float32 if self._exact else torch.float64)
        self._factors: list[tuple[Tensor, Tensor]] = []
        for A, B, scaling in zip(lora_A, lora_B, scalings, strict=True):
            A, B = A.to(torch.float64), B.to(torch.float64) * scaling
            if self._exact and A.numel() and B.numel():
                bits = (53 - (A.shape[0] - 1).bit_length()) // 2
                A, B = _balanced(A, B)
                A, B = _rounded(A, 0, bits), _rounded(B, 1, bits)
            self._factors.append((A, B))

    def __call__(self, tile: Tile) -> Tensor:
        """d of one tile in float32 (float64 for a float64 weight), contiguous."""
        shape = (tile[0].stop - tile[0].start, tile[1].stop - tile[1].start)
        total = self._like.new_zeros(shape)
        for A, B in self._factors:
            if self._exact:
                total.add_((B[tile[0]] @ A[:, tile[1]]).to(torch.float32))
            else:
                _add_by_rank(total, B[tile[0]], A[:, tile[1]])
        return total


def _balanced(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """The same product, every rank's row of A about as large as its column of B."""
    # Ranks share a grid: without this, one that is large in A and small in B would cost the others.
    difference = torch.frexp(A.abs().amax(1))[1] - torch.frexp(B.abs().amax(0))[1]
    factor = _power_of_two(torch.div(difference, 2, rounding_mode="floor"))
    return A / factor[:, None], B * factor


def _rounded(values: Tensor, dim: int, bits: int) -> Tensor:
    """values (float64) as multiples of 2**-bits of the power of two above their largest in dim."""
    _, exponent = torch.frexp(values.abs().amax(dim, keepdim=True))
    grid = _power_of_two(exponent - bits)
    return (values / grid).round_().mul_(grid)


def _power_of_two(exponent: Tensor) -> Tensor:
    # From its bits: exp2 and pow may be off by one in the last place. A float64 adapter's tiniest
    # columns are nothing to a float32 weight and stay within the exponent's range.
    return ((exponent.to(torch.int64).clamp(-1000, 1000) + 1023) << 52).view(torch.float64)


def _add_by_rank(total: Tensor, B: Tensor, A: Tensor) -> None:
    product = torch.empty_like(total)
    for r in range(A.shape[0]):
        torch.mul(B[:, r, None], A[r], out=product)
        total.add_(product)
