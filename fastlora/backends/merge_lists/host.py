"""The ops that change weights in place, on kernels that take all weights of one kind in a launch.

The host waits once for all launches and reads the state of every tile: one that could not be
changed has all of them taken back. A receipt's checksums (tiles, 2) are those of every tile, of
the merged weight and of the original.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastlora.backends.in_place import mark_written
from fastlora.backends.merge_lists import errors
from fastlora.backends.merge_lists.operands import (
    Receipts,
    join_receipts,
    parts_of,
    split_adapters,
    split_receipts,
)
from fastlora.backends.merge_lists.undo import all_or_none
from fastlora.kernels.merge.batch import (
    RAW,
    Adapter,
    Batch,
    How,
    Job,
    Kernels,
    Kind,
    State,
    as_read,
    kind_of,
    tiles_of,
)

_NOT_RESTORED = (
    "receipt: it does not give back the original weight here (its adapters or itself were "
    "edited); nothing was changed"
)


class ByKind:
    """merge_, unmerge_ and swap_ of any number of weights: a launch a kind, all or none."""

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels

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
        new = _adapters(lora_A, lora_B, scalings, counts)
        jobs = [
            Job(i, w, [], as_read(a)) for i, (w, a) in enumerate(zip(weights, new, strict=True))
        ]
        # Nobody needs the checksums of a merge for good.
        return self._run(jobs, How(undo=False, merge=True, sums=receipt), receipt)

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
        old = _adapters(lora_A, lora_B, scalings, counts)
        jobs = list(self._jobs(weights, old, receipts, [[] for _ in weights]))
        self._run(jobs, How(undo=True, merge=False, sums=True), receipt=False)

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
        """Takes the old adapters out and puts the new ones in, in one pass; a receipt each."""
        old = _adapters(old_A, old_B, old_scalings, old_counts)
        new = _adapters(lora_A, lora_B, scalings, counts)
        jobs = list(self._jobs(weights, old, receipts, new))
        return self._run(jobs, How(undo=True, merge=True, sums=True), receipt=True)

    def _jobs(
        self,
        weights: Sequence[Tensor],
        old: Sequence[list[Adapter]],
        receipts: Sequence[Tensor],
        new: Sequence[list[Adapter]],
    ) -> Iterator[Job]:
        """What to do to each weight, whose receipt is one that the kernels may read."""
        for i, (weight, out, into) in enumerate(zip(weights, old, new, strict=True)):
            parts = tuple(t.contiguous() for t in parts_of(receipts, i))
            if not _fits(parts, weight, tiles_of(weight, self._kernels.tile)):
                raise errors.set_index(RuntimeError(_NOT_RESTORED), i)
            yield Job(i, weight, as_read(out), as_read(into), parts)

    def _run(self, jobs: Sequence[Job], how: How, receipt: bool) -> Receipts:
        """Changes every weight; their receipts, or empty ones."""
        kinds: dict[Kind, list[Job]] = {}
        for job in jobs:
            kinds.setdefault(kind_of(job), []).append(job)
        batches = [Batch(self._kernels, kind, some, how) for kind, some in kinds.items()]
        with all_or_none() as undo:
            for batch in batches:
                undo.push(batch.take_back)
            for batch in batches:
                batch.run()
            receipts = _settle(batches, receipt)
            mark_written(*(job.weight for job in jobs))
        return receipts


def _adapters(
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    scalings: Sequence[float],
    counts: Sequence[int],
) -> list[list[Adapter]]:
    by_weight = split_adapters(lora_A, lora_B, scalings, counts)
    return [list(zip(*factors, strict=True)) for factors in by_weight]


def _fits(parts: Sequence[Tensor], weight: Tensor, tiles: int) -> bool:
    """Whether a receipt has the dtypes and lengths of one of the weight's."""
    positions, bits, counts, sums = parts
    dtypes = (torch.int16, RAW[weight.itemsize], torch.int32, torch.int64)
    elements = positions.numel()
    fits = all(t.dtype == dtype for t, dtype in zip(parts, dtypes, strict=True))
    fits = fits and counts.numel() == tiles and sums.numel() == 2 * tiles
    fits = fits and bits.numel() == elements
    return fits and int(counts.sum()) == elements and bool((counts >= 0).all())


def _settle(batches: Sequence[Batch], receipt: bool) -> Receipts:
    """Waits for all launches; the receipts in the order of the call's weights.

    Raises for the first weight that could not be changed.
    """
    refused: list[tuple[int, int]] = []
    made: list[tuple[Batch, Receipts]] = []
    for batch in batches:
        states, counts = batch.settle()
        refused += batch.refused(states)
        if not refused:
            made.append((batch, batch.receipts(counts) if receipt else batch.nothing()))
    if refused:
        index, state = min(refused)
        raise errors.set_index(_error(state), index)
    if len(made) == 1:
        return made[0][1]
    by_weight: dict[int, tuple[Tensor, ...]] = {}
    for batch, receipts in made:
        indices = (job.index for job in batch.jobs)
        by_weight |= dict(zip(indices, split_receipts(receipts), strict=True))
    return join_receipts([by_weight[index] for index in sorted(by_weight)])


def _error(state: int) -> Exception:
    """What is raised for a weight with a tile in ``state``."""
    if state == State.NOT_FINITE:
        return ValueError(errors.NOT_FINITE)
    if state == State.NOT_MERGED:
        return RuntimeError(errors.NOT_MERGED)
    if state == State.NOT_RESTORED:
        return RuntimeError(_NOT_RESTORED)
    return RuntimeError(f"merging: a tile was left in state {state}")
