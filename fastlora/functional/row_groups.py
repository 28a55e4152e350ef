"""Rows of a batch grouped by their adapter: sorted once a step, read by every layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RowGroups:
    """Adapter ids of T rows, and the rows in the order of their adapters. ``group_rows`` makes it.

    ids: (T,) int32 in [-1, S). order: (T,) int64, the rows by slot, those without adapter first,
    natural order within a slot. starts: (S + 1,) int64: slot s has
    ``order[starts[s]:starts[s+1]]``.
    shape: that of the ids it was made from, (T,), (B,) or (B, L). nobody: known on the host to hold
    no adapter at all.
    """

    ids: Tensor
    order: Tensor
    starts: Tensor
    num_slots: int
    shape: tuple[int, ...]
    nobody: bool = False

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """ids, order, starts: as the ops take them."""
        return self.ids, self.order, self.starts

    def repeat(self, count: int) -> RowGroups:
        """Every row ``count`` times, in place: from one id a sequence to one id a token."""
        if count == 1:
            return self
        within = torch.arange(count, device=self.order.device)
        return RowGroups(
            ids=self.ids.repeat_interleave(count),
            order=(self.order[:, None] * count + within).flatten(),
            starts=self.starts * count,
            num_slots=self.num_slots,
            shape=(*self.shape, count),
            nobody=self.nobody,
        )
