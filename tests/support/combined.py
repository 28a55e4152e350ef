"""Adapters to combine, and the sums that they stand for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Adapter = tuple[Tensor, Tensor, float]


def delta(adapter: Adapter) -> Tensor:
    A, B, scaling = adapter
    return scaling * (B.double() @ A.double())


def error_scale(adapters: Sequence[Adapter], weights: Sequence[float]) -> float:
    """What rounding errors are relative to: without what cancels."""
    parts = zip(adapters, weights, strict=True)
    return sum(float((s * w * B.norm() * A.norm()).abs()) for (A, B, s), w in parts)


def assert_near(got: Adapter, want: Adapter, scale: float, tolerance: float = 1e-5) -> None:
    """Rounding, which cutting between two close singular values enlarges."""
    error = float((delta(got) - delta(want)).norm())
    assert error <= tolerance * scale, f"{error:.1e} of {scale:.1e}"


def weighted_sum_of_deltas(adapters: Sequence[Adapter], weights: Sequence[float]) -> Tensor:
    deltas = [w * delta(adapter) for adapter, w in zip(adapters, weights, strict=True)]
    return torch.stack(deltas).sum(0)


def random_adapters(
    *ranks: int, N: int = 12, K: int = 10, dtype: torch.dtype = torch.float32
) -> list[Adapter]:
    return [(torch.randn(r, K, dtype=dtype), torch.randn(N, r, dtype=dtype), 0.5) for r in ranks]
