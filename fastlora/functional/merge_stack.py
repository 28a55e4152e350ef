"""Adapters merged one after another into a weight, any of which can be taken out again."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastlora.backends.merge_lists.undo import all_or_none
from fastlora.functional.merge import merge_, swap_, unmerge_
from fastlora.functional.merge_groups import remerge
from fastlora.functional.receipt import Adapter, MergeReceipt


class MergeStack:
    """Merges into weight (N, K) under names, in order; taking one out leaves the bits of the rest.

    Every merge rounds, so what is above the one taken out has to come off first and go back on:
    two passes over the weight for each. Every method leaves weight and stack as they were when it
    raises.
    """

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self._receipts: dict[str, MergeReceipt] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """What is merged, in the order of merging."""
        return tuple(self._receipts)

    def merge(self, name: str, adapters: Sequence[Adapter], *, snapshot: bool = False) -> None:
        """``functional.merge_`` on top of the rest; ValueError for a name that is there."""
        if name in self._receipts:
            raise ValueError(f"name: expected one that is not merged yet, got {name!r}")
        made = merge_(self.weight, adapters, snapshot=snapshot)
        assert made is not None
        self._receipts[name] = made

    def remove(self, name: str) -> None:
        """The weight as if ``name`` had never been merged, to the bit; ValueError if it was not."""
        self._change(name, None)

    def swap(self, name: str, adapters: Sequence[Adapter]) -> None:
        """The weight as if ``adapters`` had been merged in the place of ``name``, to the bit."""
        self._change(name, adapters)

    def _change(self, name: str, adapters: Sequence[Adapter] | None) -> None:
        if name not in self._receipts:
            raise ValueError(f"name: expected one of {self.names}, got {name!r}")
        before, after = dict(self._receipts), dict(self._receipts)
        above = self.names[self.names.index(name) + 1 :]
        with all_or_none() as undo:
            undo.push(self._set_receipts, before)
            for other in reversed(above):
                unmerge_(self.weight, before[other])
                undo.push(self._merge_again, before, other)
            if adapters is None:
                unmerge_(self.weight, after.pop(name))
                undo.push(self._merge_again, before, name)
            else:
                after[name] = swap_(self.weight, before[name], adapters)
                undo.push(self._swap_back, after[name], before, name)
            for other in above:
                self._merge_again(after, other)
                undo.push(unmerge_, self.weight, after[other])
            self._receipts = after

    def _merge_again(self, receipts: dict[str, MergeReceipt], name: str) -> None:
        """Merges what ``name`` was, and puts its new receipt in the place of the old one."""
        (receipts[name],) = remerge([self.weight], [receipts[name]])

    def _swap_back(self, new: MergeReceipt, receipts: dict[str, MergeReceipt], name: str) -> None:
        old = receipts[name].on(self.weight.device).adapters
        receipts[name] = swap_(self.weight, new, old)

    def _set_receipts(self, receipts: dict[str, MergeReceipt]) -> None:
        self._receipts = receipts
