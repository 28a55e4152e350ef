"""Adapters merged one after another into a weight, any of which can be taken out again."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastlora.backends.merge_lists import undo as each
from fastlora.functional.merge import foreach_remerge_, merge_, swap_, unmerge_
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
        at = self.names.index(name)
        kept = dict(list(self._receipts.items())[:at])
        above = list(self._receipts.items())[at + 1 :]
        with each.all_or_none() as done:
            before = dict(self._receipts)
            done.append(lambda: self._note(before))
            for other, receipt in reversed(above):
                unmerge_(self.weight, receipt)
                done.append(lambda n=other, r=receipt: before.update({n: self._again(r)}))
            receipt = self._receipts[name]
            if adapters is None:
                unmerge_(self.weight, receipt)
                done.append(lambda: before.update({name: self._again(receipt)}))
            else:
                kept[name] = swap_(self.weight, receipt, adapters)
                done.append(lambda: before.update({name: self._back(kept[name], receipt)}))
            for other, receipt_above in above:
                kept[other] = self._again(receipt_above)
                done.append(lambda n=other: unmerge_(self.weight, kept[n]))
            self._receipts = kept

    def _again(self, receipt: MergeReceipt) -> MergeReceipt:
        return foreach_remerge_([self.weight], [receipt])[0]

    def _back(self, new: MergeReceipt, old: MergeReceipt) -> MergeReceipt:
        return swap_(self.weight, new, old.on(self.weight.device).adapters)

    def _note(self, receipts: dict[str, MergeReceipt]) -> None:
        self._receipts = receipts
