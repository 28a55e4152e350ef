"""Rows of a batch grouped by their adapter: sorted once a step, read by every layer."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastlora.backends.values import Rows
from fastlora.functional.checks import multi as checks
from fastlora.ops import call as ops
from fastlora.ops import dispatch


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
        """Repeats every row ``count`` times, in place: from one id a sequence to one a token."""
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


def group_rows(adapter_ids: Tensor, num_slots: int) -> RowGroups:
    """Sorts the rows of a batch by adapter, once for every layer that sees the batch.

    adapter_ids: int32 or int64 (T,), (B,) or (B, L), values in [-1, num_slots), -1 = no adapter.
    Raises TypeError for other dtypes, ValueError for other shapes and for host ids out of range; on
    a device, which is not waited for, those count as -1.
    """
    if not isinstance(adapter_ids, Tensor):
        raise TypeError(f"adapter_ids: expected a torch.Tensor, got {type(adapter_ids).__name__}")
    if adapter_ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"adapter_ids: expected int32 or int64, got {adapter_ids.dtype}")
    if adapter_ids.dim() not in (1, 2):
        raise ValueError(
            f"adapter_ids: expected shape (T,), (B,) or (B, L), got {tuple(adapter_ids.shape)}"
        )
    checks.slot_count(num_slots)
    backend = dispatch.choose("group_rows", adapter_ids.device)
    ids, order, starts = ops.call("group_rows", adapter_ids.flatten(), num_slots, backend)
    return RowGroups(ids, order, starts, num_slots, tuple(adapter_ids.shape))


def rows_of(
    x: Tensor,
    adapter_ids: Tensor | RowGroups,
    scalings: Tensor,
    ranks: Tensor | None,
    row_scales: Tensor | None,
) -> Rows:
    """Checks adapter_ids and row_scales for x's rows, and groups the rows if nobody has.

    scalings (S,), already checked, says how many slots there are.
    """
    S, lead = scalings.shape[0], tuple(x.shape)[:-1]
    groups = adapter_ids
    if not isinstance(groups, RowGroups):
        groups = group_rows(groups, S)
    if groups.num_slots != S:
        raise ValueError(f"adapter_ids: grouped for {groups.num_slots} slots, but there are {S}")
    if groups.order.device != x.device:
        raise ValueError(f"adapter_ids: expected them on {x.device}, got {groups.order.device}")
    if not lead:
        raise ValueError(f"x: expected rows, (T, K) or (B, ..., K), got shape {tuple(x.shape)}")
    shape = groups.shape
    if lead[: len(shape)] != shape:
        raise ValueError(
            f"adapter_ids: expected shape {lead[:1]} or {lead} for x {tuple(x.shape)}, got {shape}"
        )
    if len(shape) < len(lead):
        groups = groups.repeat(math.prod(lead[len(shape) :]))
    if row_scales is not None:
        row_scales = checks.row_scales(row_scales, x)
    return Rows(groups.ids, groups.order, groups.starts, scalings, ranks, row_scales)
