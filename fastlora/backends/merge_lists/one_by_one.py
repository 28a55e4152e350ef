"""The ops that change weights in place, from a backend's functions of one weight."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from fastlora.backends import interrupts
from fastlora.backends.merge_lists import errors
from fastlora.backends.merge_lists.operands import (
    Receipts,
    join_receipts,
    parts_of,
    split_adapters,
)
from fastlora.backends.merge_lists.undo import all_or_none


class OneByOne:
    """merge_, unmerge_ and swap_ of any number of weights: one after another, all or none.

    merge(weight, *factors, receipt) returns a receipt's parts; unmerge(weight, *factors, *parts).
    """

    def __init__(
        self, merge: Callable[..., Sequence[Tensor]], unmerge: Callable[..., None]
    ) -> None:
        self._merge, self._unmerge = merge, unmerge

    def merge_(
        self,
        weights: Sequence[Tensor],
        lora_A: Sequence[Tensor],
        lora_B: Sequence[Tensor],
        scalings: Sequence[float],
        counts: Sequence[int],
        receipt: bool,
    ) -> Receipts:
        """Puts its adapters into each weight (N, K); a receipt each, or empty ones."""
        # Of several weights the first can only be had back with a receipt, should the last fail.
        noted = receipt or len(weights) > 1
        adapters = split_adapters(lora_A, lora_B, scalings, counts)
        receipts: list[Sequence[Tensor]] = []
        with all_or_none() as undo:
            for i, (weight, factors) in enumerate(zip(weights, adapters, strict=True)):
                with errors.at(i):
                    parts = self._merge(weight, *factors, noted)
                if noted:
                    undo.push(self._unmerge, weight, *factors, *parts)
                receipts.append(parts if receipt else [t[:0] for t in parts])
                interrupts.check()
            return join_receipts(receipts)

    def unmerge_(
        self,
        weights: Sequence[Tensor],
        lora_A: Sequence[Tensor],
        lora_B: Sequence[Tensor],
        scalings: Sequence[float],
        counts: Sequence[int],
        receipts: Sequence[Tensor],
    ) -> None:
        """Takes its adapters out of each weight, to the bit."""
        adapters = split_adapters(lora_A, lora_B, scalings, counts)
        with all_or_none() as undo:
            for i, (weight, factors) in enumerate(zip(weights, adapters, strict=True)):
                with errors.at(i):
                    self._unmerge(weight, *factors, *parts_of(receipts, i))
                undo.push(self._merge, weight, *factors, False)
                interrupts.check()

    def swap_(
        self,
        weights: Sequence[Tensor],
        old_A: Sequence[Tensor],
        old_B: Sequence[Tensor],
        old_scalings: Sequence[float],
        old_counts: Sequence[int],
        receipts: Sequence[Tensor],
        lora_A: Sequence[Tensor],
        lora_B: Sequence[Tensor],
        scalings: Sequence[float],
        counts: Sequence[int],
    ) -> Receipts:
        """Takes the old adapters out of each weight and puts the new ones in; a receipt each."""
        old = split_adapters(old_A, old_B, old_scalings, old_counts)
        new = split_adapters(lora_A, lora_B, scalings, counts)
        fresh: list[Sequence[Tensor]] = []
        with all_or_none() as undo:
            for i, (weight, out, into) in enumerate(zip(weights, old, new, strict=True)):
                with errors.at(i):
                    self._unmerge(weight, *out, *parts_of(receipts, i))
                    undo.push(self._merge, weight, *out, False)
                    parts = self._merge(weight, *into, True)
                    undo.push(self._unmerge, weight, *into, *parts)
                fresh.append(parts)
                interrupts.check()
            return join_receipts(fresh)
