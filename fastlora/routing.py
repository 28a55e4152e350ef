"""Which rows of the running batch are which adapter's: every layer asks, sorted once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from fastlora import functional as F

# What a batch sets while it runs.
_RUNNING = ("num_slots", "slots", "nobody", "copies", "per_token", "groups", "scales", "scaled")


class Routing:
    """The slot of each row of the batch that is running, grouped once a step; -1 = no adapter.

    outside: what to do, in the error of a layer that runs while no batch does.
    """

    def __init__(self, outside: str) -> None:
        self.outside = outside
        self.num_slots = 0
        self.slots: Tensor | None = None
        self.nobody = False
        self.copies = 1
        self.per_token = False
        self.groups: list[F.RowGroups] = []
        self.scales: Tensor | None = None
        self.scaled: list[Tensor] = []

    @contextmanager
    def running(
        self,
        slots: list[int],
        num_slots: int,
        copies: int = 1,
        scales: Sequence[float] | None = None,
        per_token: bool = False,
    ) -> Iterator[None]:
        """Within, row i goes through ``slots[i]``, and so do its ``copies`` (beams, samples).

        scales: numbers that row i's adapter part is multiplied by. per_token: a row is a token,
        wherever the layers' inputs break lines: (1, T, K), (T, K).
        """
        before = {name: getattr(self, name) for name in _RUNNING}
        self.num_slots, self.copies, self.groups, self.scaled = num_slots, copies, [], []
        self.per_token = per_token
        self.nobody = not any(slot >= 0 for slot in slots)
        with torch.inference_mode(False):
            self.slots = torch.tensor(slots, dtype=torch.int32)
            self.scales = None if scales is None else torch.tensor(scales, dtype=torch.float32)
        try:
            yield
        finally:
            for name, value in before.items():
                setattr(self, name, value)

    def slots_for(self, x: Tensor) -> Tensor:
        """The slots, for a layer whose input x has the batch's rows first; else RuntimeError."""
        if self.slots is None:
            raise RuntimeError(f"no adapters were named: {self.outside}")
        given = len(self.slots)
        rows = math.prod(x.shape[:-1]) if self.per_token else x.shape[0]
        if x.dim() < 2 or rows not in (given, given * self.copies):
            raise RuntimeError(
                f"x: expected {given} rows first, one an adapter name, got shape "
                f"{tuple(x.shape)}: adapter_names has another number of names than the batch has "
                "rows, or this layer does not see the batch; then leave it out with exclude_modules"
            )
        return self.slots

    def groups_for(self, x: Tensor) -> F.RowGroups:
        """The groups of a layer's input x (B, ..., K), or of ``copies`` neighbours a batch row."""
        slots, lead = self.slots_for(x), tuple(x.shape[:-1])
        rows, given = math.prod(lead), len(slots)
        # Searched, not looked up: under torch.compile a key would hold the batch to one size.
        for groups in self.groups:
            if groups.ids.shape[0] == rows and groups.ids.device == x.device:
                return replace(groups, shape=lead)
        # What is made in inference mode cannot be saved for backward.
        with torch.inference_mode(False):
            groups = F.group_rows(slots.to(x.device), self.num_slots)
            groups = replace(groups.repeat(rows // given if given else 1), nobody=self.nobody)
        self.groups.append(groups)
        return replace(groups, shape=lead)

    def scales_for(self, x: Tensor) -> Tensor | None:
        """row_scales for a layer's input x (B, ..., K): one a row, or None where all are 1."""
        if self.scales is None:
            return None
        lead = tuple(x.shape[:-1])
        rows, given = math.prod(lead), len(self.scales)
        for scales in self.scaled:
            if scales.shape[0] == rows and scales.device == x.device:
                return scales.view(lead)
        with torch.inference_mode(False):
            scales = self.scales.to(x.device).repeat_interleave(rows // given if given else 1)
        self.scaled.append(scales)
        return scales.view(lead)
