"""How much of an adapter's change has arrived in a weight that was rounded after a merge."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastlora.backends.dtypes import BITS, FLOATS
from fastlora.functional.receipt import Adapter

# Below it a merge deserves a warning: the dtype swallowed part of the adapter.
# Normal weights and deltas of rank 16 at |d|/|W| = 0.0001 / 0.001 / 0.002 / 0.003 / 0.005 / 0.01
# gain 0.06 / 0.53 / 0.82 / 0.93 / 0.99 / 1.00 in bfloat16, 0.44 / 0.999 / 1.00 … in float16 and
# 1.00 throughout in float32.
LOW_GAIN = 0.9

# Elements of a block, which is held a few times over in float64: a core's cache has room for it.
_BLOCK = 1 << 16


class FidelityWarning(UserWarning):
    """Of a merge that has lost a good part of its adapter to rounding."""


@dataclass(frozen=True)
class Fidelity:
    """What became of the change d that adapters make to a weight W, in the merged weight M.

    gain: ``<M - W, d> / <d, d>``, the share of d that arrived; 1 is all of it. error:
    ``||M - W - d|| / ||d||``. changed: the share of elements whose bits differ. size:
    ``||d|| / ||W||``.
    Where d is zero there is nothing to lose: gain 1, and error 0 unless M differs from W all the
    same (then infinite). Elements where W is not finite count as changed or not, and no further.
    """

    gain: float
    error: float
    changed: float
    size: float

    def __str__(self) -> str:
        return (
            f"gain {self.gain:.3f}, error {self.error:.2g}, {self.changed:.1%} changed, "
            f"|d|/|W| {self.size:.2g}"
        )


@torch.no_grad()
def measure(before: Tensor, after: Tensor, adapters: Sequence[Adapter]) -> Fidelity:
    """Compares weight ``after`` the merge with the one ``before`` it, both (N, K) of one dtype.

    float16, bfloat16, float32 or float64 of any strides, on any one device; adapters: [(lora_A
    (R, K), lora_B (N, R), scaling), …] of any float dtypes. d and the sums are float64; nothing
    of the weight's size is allocated. Raises TypeError or ValueError naming what does not fit.
    """
    _check(before, after, adapters)
    N, K = before.shape
    sums, changed = (
        before.new_zeros(4, dtype=torch.float64),
        before.new_zeros((), dtype=torch.int64),
    )
    A = [lora_A.to(torch.float64) for lora_A, _, _ in adapters]
    height = max(1, _BLOCK // max(1, K))
    for n in range(0, N if K else 0, height):
        rows = slice(n, n + height)
        W, M = before[rows], after[rows]
        changed += (_bits(W) != _bits(M)).sum()
        d = W.new_zeros(W.shape, dtype=torch.float64)
        for wide, (_, lora_B, scaling) in zip(A, adapters, strict=True):
            d.addmm_(lora_B[rows].to(torch.float64), wide, alpha=scaling)
        sums += _sums(W.to(torch.float64), M.to(torch.float64), d)
    dd, along, off, ww = sums.tolist()
    return Fidelity(
        gain=along / dd if dd else 1.0,
        error=math.sqrt(off / dd) if dd else (math.inf if off else 0.0),
        changed=changed.item() / max(1, before.numel()),
        size=math.sqrt(dd / ww) if ww else (math.inf if dd else 0.0),
    )


def _sums(W: Tensor, M: Tensor, d: Tensor) -> Tensor:
    """<d, d>, <M - W, d>, |M - W - d|^2 and |W|^2, a block's, all float64."""
    finite = W.isfinite()
    if not finite.all():
        W, M, d = (t.where(finite, 0.0) for t in (W, M, d))
    w, moved, asked = W.flatten(), (M - W).flatten(), d.flatten()
    along = moved.dot(asked)
    lost = moved.sub_(asked)
    return torch.stack((asked.dot(asked), along, lost.dot(lost), w.dot(w)))


def _bits(values: Tensor) -> Tensor:
    return values.contiguous().view(BITS[values.itemsize])


def _check(before: Tensor, after: Tensor, adapters: Sequence[Adapter]) -> None:
    if before.dtype not in FLOATS:
        raise TypeError(f"before: expected a float16 to float64 weight, got {before.dtype}")
    if before.dim() != 2:
        raise ValueError(f"before: expected shape (N, K), got {tuple(before.shape)}")
    if after.dtype != before.dtype:
        raise TypeError(f"after: expected before's dtype {before.dtype}, got {after.dtype}")
    if after.shape != before.shape:
        raise ValueError(f"after: expected shape {tuple(before.shape)}, got {tuple(after.shape)}")
    N, K = before.shape
    for i, (A, B, _) in enumerate(adapters):
        if A.dim() != 2 or A.shape[1] != K:
            raise ValueError(f"adapters[{i}]: lora_A: expected (R, {K}), got {tuple(A.shape)}")
        if tuple(B.shape) != (N, A.shape[0]):
            raise ValueError(
                f"adapters[{i}]: lora_B: expected {(N, A.shape[0])}, got {tuple(B.shape)}"
            )
