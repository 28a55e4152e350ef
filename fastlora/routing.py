"""Which rows of the running batch are which adapter's: every layer asks, sorted once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from fastlora import functional as F


class Routing:
    """The slot of each row of the batch that is running, grouped once a step; -1 = no adapter.

    outside: what to do, in the error of a layer that runs while no batch does.
    """

    def __init__(self, outside: str) -> None:
        self.outside = outside
        self.num_slots = 0
        self.slots: Tensor | None = None
        self.copies = 1
        self.groups: dict[tuple[object, ...], F.RowGroups] = {}

    @contextmanager
    def running(self, slots: list[int], num_slots: int, copies: int = 1) -> Iterator[None]:
        """Within, row i goes through ``slots[i]``, and so do its ``copies`` (beams, samples)."""
        before = self.num_slots, self.slots, self.copies, self.groups
        self.num_slots, self.copies, self.groups = num_slots, copies, {}
        with torch.inference_mode(False):
            self.slots = torch.tensor(slots, dtype=torch.int32)
        try:
            yield
        finally:
            self.num_slots, self.slots, self.copies, self.groups = before

    def slots_for(self, x: Tensor) -> Tensor:
        """The slots, for a layer whose input x has the batch's rows first; else RuntimeError."""
        if self.slots is None:
            raise RuntimeError(f"no adapters were named: {self.outside}")
        given = len(self.slots)
        if x.dim() < 2 or x.shape[0] not in (given, given * self.copies):
            raise RuntimeError(
                f"x: expected {given} rows first, one an adapter name, got shape "
                f"{tuple(x.shape)}: this layer "
                "does not see the batch; leave it out with exclude_modules"
            )
        return self.slots

    def groups_for(self, x: Tensor) -> F.RowGroups:
        """The groups of a layer's input x (B, ..., K), or of ``copies`` neighbours a batch row."""
        slots = self.slots_for(x)
        rows, inner, given = x.shape[0], tuple(x.shape[1:-1]), len(slots)
        # What is made in inference mode cannot be saved for backward.
        key = (rows, inner, x.device, torch.is_inference_mode_enabled())
        if key not in self.groups:
            ids = slots.repeat_interleave(rows // given) if given else slots
            groups = F.group_rows(ids.to(x.device), self.num_slots)
            groups = replace(groups, nobody=not bool((slots >= 0).any()))
            self.groups[key] = groups.repeat(inner[0]) if len(inner) == 1 else groups
        return self.groups[key]
