"""What a merge leaves behind so that it can be undone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# (lora_A (R, K), lora_B (N, R), scaling)
Adapter = tuple[Tensor, Tensor, float]


def columns(adapters: Sequence[Adapter]) -> tuple[list[Tensor], list[Tensor], list[float]]:
    """The adapters as the ops take them: every lora_A, every lora_B, every scaling."""
    return [A for A, _, _ in adapters], [B for _, B, _ in adapters], [s for _, _, s in adapters]


@dataclass(frozen=True)
class MergeReceipt:
    """Everything ``unmerge_`` needs, for one weight (N, K). Made by ``merge_``.

    adapters: copies of what was merged. positions (P,) and bits (P,): the elements that subtraction
    alone would not restore, each by its place in its tile (16 bits without a sign, in an int16) and
    its raw bits; counts (tiles,): how many each tile has.
    checksums (2,) int64 of the merged weight, and of the original one or all that gives it back.
    kernel names the arithmetic.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    backend: str
    kernel: str
    adapters: tuple[Adapter, ...]
    positions: Tensor
    bits: Tensor
    counts: Tensor
    checksums: Tensor

    @staticmethod
    def make(
        weight: Tensor,
        adapters: Sequence[Adapter],
        backend: str,
        kernel: str,
        parts: Sequence[Tensor],
    ) -> MergeReceipt:
        """adapters: copies, which the receipt keeps."""
        shape = (weight.shape[0], weight.shape[1])
        return MergeReceipt(shape, weight.dtype, backend, kernel, tuple(adapters), *parts)

    @property
    def nbytes(self) -> int:
        """Bytes held, the adapters' copies included."""
        held = [self.positions, self.bits, self.counts, self.checksums]
        held += [t for A, B, _ in self.adapters for t in (A, B)]
        return sum(t.nbytes for t in held)

    def check(self, weight: Tensor, kernel: str) -> None:
        """Raises unless the receipt can speak of a weight like this one; ``kernel`` is today's."""
        if not isinstance(weight, Tensor) or weight.dtype != self.dtype:
            found = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
            raise TypeError(f"weight: the receipt is for {self.dtype}, got {found}")
        if tuple(weight.shape) != self.shape:
            raise ValueError(
                f"weight: the receipt is for shape {self.shape}, got {tuple(weight.shape)}"
            )
        if self.kernel != kernel:
            raise RuntimeError(
                f"receipt: made by kernel {self.kernel!r}, but this version has {kernel!r}"
            )

    def operands(self, device: torch.device) -> tuple[object, ...]:
        """The op's arguments between weight and backend."""
        A, B, scalings = columns(self.adapters)
        return (
            [t.to(device) for t in A],
            [t.to(device) for t in B],
            scalings,
            self.positions.to(device),
            self.bits.to(device),
            self.counts,
            self.checksums.to(device),
        )
