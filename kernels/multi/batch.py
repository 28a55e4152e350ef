"""Operands of a product whose rows have different adapters, as the launchers take them.

``fastlora/backends/values.py`` has what these are made of: the operands as the ops take them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class KernelRows:
    """Which adapter each row has: ids int32 (T,), order int64 (T,), the rows by slot.

    scalings (S,), ranks int (S,) or None, row_scales (T,) or None; all of unit stride.
    """

    ids: Tensor
    order: Tensor
    scalings: Tensor
    ranks: Tensor | None
    row_scales: Tensor | None

    @classmethod
    def of(
        cls, ids: Tensor, order: Tensor, scalings: Tensor, *optional: Tensor | None
    ) -> KernelRows:
        """Copies what has no unit stride."""
        ranks, row_scales = (None if t is None else t.contiguous() for t in optional)
        return cls(ids.contiguous(), order.contiguous(), scalings.contiguous(), ranks, row_scales)

    @property
    def pointers(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """ids, scalings, ranks, row_scales; for what is None one that is never read."""
        ids = self.ids
        return (
            ids,
            self.scalings,
            ids if self.ranks is None else self.ranks,
            ids if self.row_scales is None else self.row_scales,
        )

    @property
    def flags(self) -> dict[str, Any]:
        return {"RANKS": self.ranks is not None, "ROW_SCALES": self.row_scales is not None}


@dataclass(frozen=True)
class KernelAdapters:
    """S slots of at most R ranks: a (S, C * R, K), b (S, R, N), for C slices of a projection.

    With a table (S, pages a slot): a (P, C * page, K), b (P, page, N), R all of a slot's pages.
    """

    a: Tensor
    b: Tensor
    S: int
    R: int
    table: Tensor | None = None

    @classmethod
    def of(cls, a: Tensor, b: Tensor, table: Tensor | None = None) -> KernelAdapters:
        """Turns lora_B: from lora_A (S, C * R, K) and lora_B (S, N, R), or pages of both."""
        b = b.transpose(1, 2)
        if table is None:
            return cls(a, b, a.shape[0], b.shape[1])
        table = table if table.stride(1) == 1 else table.contiguous()
        return cls(a, b, table.shape[0], table.shape[1] * b.shape[1], table)

    @property
    def turned(self) -> KernelAdapters:
        """a and b exchanged, for backward; for one slice, without a table."""
        return replace(self, a=self.b, b=self.a)

    @property
    def ranks_together(self) -> int:
        """How many ranks of one slice lie in one slot or page."""
        return self.b.shape[1]

    @property
    def a_strides(self) -> tuple[int, int, int, int]:
        """Strides of a slot or page, a slice, a rank, a column."""
        slot, rank, column = self.a.stride()
        return slot, rank * self.ranks_together, rank, column

    @property
    def pages(self) -> tuple[Tensor, int, int]:
        """The table, how many pages there are, and its rows' stride."""
        if self.table is None:
            return self.a, 0, 0
        return self.table, self.a.shape[0], self.table.stride(0)

    @property
    def form(self) -> dict[str, Any]:
        paged = self.table is not None
        return {"TABLE": paged, "PAGE": self.ranks_together if paged else 1}


# Programs that take one adapter each of a tile of sorted rows, while there are fewer than these;
# then a program takes one after the other. Four for each of about a hundred SMs, by arithmetic.
PROGRAMS = 512


def rows_grid(T: int, S: int, tile: int) -> tuple[int, int]:
    """Programs by tiles of sorted rows, and by how many adapters such a tile holds at most."""
    tiles, most = -(-T // tile), max(1, min(T, tile, S + 1))
    return tiles, max(1, min(most, PROGRAMS // tiles))
