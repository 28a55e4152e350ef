"""Products that the plain-torch ops share: gradients summed wide, in blocks that fit a cache."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastlora.backends.torch import products as library

# Elements that are widened or masked at a time. On a CPU the block's float32 copy (1 MiB) should
# stay in a core's L2 cache; elsewhere few launches matter more (not measured on a GPU).
_CPU_BLOCK, _BLOCK = 1 << 18, 1 << 24


def row_blocks(x: Tensor) -> Iterator[slice]:
    size = _CPU_BLOCK if x.device.type == "cpu" else _BLOCK
    step = max(1, size // max(1, x.shape[1]))
    for first in range(0, x.shape[0], step):
        yield slice(first, min(first + step, x.shape[0]))


def accumulator(*dtypes: torch.dtype) -> torch.dtype:
    wide = torch.float32
    for dtype in dtypes:
        wide = torch.promote_types(wide, dtype)
    return wide


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, invariant: bool) -> Tensor:
    """The base product (M, N); invariant: one library call a row, each of the same shape."""
    if not invariant:
        return library.linear(x, weight, bias)
    y = x.new_empty(x.shape[0], weight.shape[0])
    for row in range(x.shape[0]):
        y[row] = library.linear(alone(x, row), weight, bias)[0]
    return y


def alone(t: Tensor, row: int) -> Tensor:
    """A row (1, C) in memory of its own: a library may look at how it lies."""
    return t[row : row + 1].clone(memory_format=torch.contiguous_format)


def base_gradient(dy: Tensor, x: Tensor, weight: Tensor | None) -> Tensor:
    return library.mm(dy, weight) if weight is not None else x.new_zeros(x.shape)


def adapter_gradient(left: Tensor, right: Tensor, dtype: torch.dtype, scaling: float) -> Tensor:
    """``scaling * left.T @ right`` in ``dtype``, accumulated in float32 or wider."""
    if dtype == right.dtype:
        return library.mm(left.T, right).mul_(scaling)
    wide = accumulator(dtype, right.dtype)
    total = right.new_zeros(left.shape[1], right.shape[1], dtype=wide)
    for rows in row_blocks(right if right.shape[1] > left.shape[1] else left):
        total.addmm_(left[rows].T.to(wide), right[rows].to(wide))
    return total.mul_(scaling).to(dtype)
