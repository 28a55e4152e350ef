"""Adapters of many slots and the rows that use them, as every backend's functions take them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class Rows(NamedTuple):
    """Which adapter each of T rows has, of S slots; the first three are ``RowGroups``'.

    scalings (S,), ranks int (S,) or None for all R, row_scales float (T,) or None for 1.
    """

    # Each row's slot; the rows sorted by slot; where each slot's rows start among the sorted ones.
    ids: Tensor
    order: Tensor
    starts: Tensor
    scalings: Tensor
    ranks: Tensor | None
    row_scales: Tensor | None


class Adapters(NamedTuple):
    """S slots of at most R ranks, for one projection or for one of C slices: see ``packed.py``.

    Dense: lora_A (S, C * R, K), lora_B (S, N, R). In pages, with a table (S, pages a slot): lora_A
    (P, C * page, K), lora_B (P, N, page). ends: where each slice's columns end; empty in the ops
    without slices.
    """

    lora_A: Tensor
    lora_B: Tensor
    table: Tensor | None = None
    ends: Sequence[int] = ()

    def count_ranks(self) -> int:
        """R: of all pages of a slot where adapters lie in pages."""
        R = self.lora_B.shape[2]
        return R if self.table is None else R * self.table.shape[1]
