"""What a merge leaves behind so that it can be undone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# (lora_A (R, K), lora_B (N, R), scaling)
Adapter = tuple[Tensor, Tensor, float]
# Every lora_A, every lora_B, every scaling, and how many each weight has.
Columns = tuple[list[Tensor], list[Tensor], list[float], list[int]]


def columns(adapters: Iterable[Sequence[Adapter]]) -> Columns:
    """The adapters of several weights as the ops take them."""
    each = [list(some) for some in adapters]
    flat = [adapter for some in each for adapter in some]
    A, B, scalings = ([adapter[i] for adapter in flat] for i in range(3))
    return A, B, scalings, [len(some) for some in each]  # pyright: ignore[reportReturnType]


@dataclass(frozen=True, eq=False)
class MergeReceipt:
    """Everything ``unmerge_`` needs, for one weight (N, K). Made by ``merge_``.

    adapters: copies of what was merged. positions (P,) and bits (P,): the elements that subtraction
    alone would not restore, each by its place in its tile (16 bits without a sign, in an int16) and
    its raw bits; counts (tiles,): how many each tile has. checksums, int64: of the merged weight,
    and of the original one or all that gives it back, of the whole or of every tile. kernel names
    the arithmetic, the GPU's architecture and the compiler where it depends on them.

    snapshot: instead, a copy of the original weight, which no arithmetic has to give back.
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
    snapshot: Tensor | None = None

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As the ops take them."""
        return self.positions, self.bits, self.counts, self.checksums

    @property
    def nbytes(self) -> int:
        """Bytes held, the adapters' copies included."""
        held = [*self.parts, *(t for A, B, _ in self.adapters for t in (A, B)), self.snapshot]
        return sum(t.nbytes for t in held if t is not None)

    def check(self, weight: Tensor) -> None:
        """Raises unless the receipt can speak of a weight like this one."""
        if not isinstance(weight, Tensor) or weight.dtype != self.dtype:
            found = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
            raise TypeError(
                f"weight: the receipt is for {self.dtype}, got {found}; converting a merged weight "
                "leaves bits behind: unmerge before it, or load the base anew"
            )
        if tuple(weight.shape) != self.shape:
            raise ValueError(
                f"weight: the receipt is for shape {self.shape}, got {tuple(weight.shape)}"
            )

        copy = self.snapshot
        if copy is not None and (copy.shape != weight.shape or copy.dtype != weight.dtype):
            raise ValueError(
                f"receipt: expected a snapshot of {self.dtype} and shape {self.shape}, got "
                f"{copy.dtype} and {tuple(copy.shape)}"
            )

    def check_kernel(self, kernel: str) -> None:
        """Raises unless ``kernel``, which would undo the merge here, is the one that made it."""
        if self.snapshot is None and self.kernel != kernel:
            raise RuntimeError(
                f"receipt: made by kernel {self.kernel!r}, but here it is {kernel!r}, whose delta "
                "may have other bits; merge with snapshot=True where that can happen"
            )

    def on(self, device: torch.device) -> MergeReceipt:
        """The same with its tensors where a weight on ``device`` wants them."""
        adapters = tuple((A.to(device), B.to(device), s) for A, B, s in self.adapters)
        moved = {name: getattr(self, name).to(device) for name in ("positions", "bits")}
        moved["checksums"] = self.checksums.to(device)
        return MergeReceipt(**{**vars(self), **moved, "adapters": adapters})


def new_receipt(
    weight: Tensor,
    adapters: Sequence[Adapter],
    backend: str,
    kernel: str,
    parts: Sequence[Tensor],
    snapshot: Tensor | None = None,
) -> MergeReceipt:
    """The receipt of a merge into weight (N, K); parts: positions, bits, counts, checksums."""
    N, K = weight.shape
    return MergeReceipt(
        (N, K), weight.dtype, backend, kernel, tuple(adapters), *parts, snapshot=snapshot
    )
