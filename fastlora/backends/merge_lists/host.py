"""The ops that change weights in place, for any number of weights: all of them or none.

Weights of one kind share a launch; the host waits once for all and reads the state of every tile.
Adapters come flat, ``counts`` of them a weight; a receipt is four tensors: positions, bits, counts
and checksums (tiles, 2) of the tiles of M and W.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import torch
from torch import Tensor

from fastlora.backends.in_place import mark_written
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

PARTS = 4  # of a receipt
# Those of all weights one after another, and how many elements, tiles and checksums are whose.
Receipts = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def merge_(
    kernels: Kernels,
    weights: Sequence[Tensor],
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    scalings: Sequence[float],
    counts: Sequence[int],
    receipt: bool,
) -> Receipts:
    """Puts its adapters into each weight (N, K); a receipt each, or nothing."""
    new = _by_weight(lora_A, lora_B, scalings, counts)
    jobs = [Job(i, w, [], as_read(a)) for i, (w, a) in enumerate(zip(weights, new, strict=True))]
    # The checksums of a merge for good are nobody's.
    return _run(kernels, jobs, How(False, True, receipt), receipt)


def unmerge_(
    kernels: Kernels,
    weights: Sequence[Tensor],
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    scalings: Sequence[float],
    counts: Sequence[int],
    receipts: Sequence[Tensor],
) -> None:
    """Takes its adapters out of each weight, to the bit."""
    old = _by_weight(lora_A, lora_B, scalings, counts)
    jobs = _jobs(kernels.tile, weights, old, receipts, [[] for _ in weights])
    _run(kernels, jobs, How(True, False, True), False)


def swap_(
    kernels: Kernels,
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
    """Takes the old adapters out and puts the new ones in, in one pass; a new receipt each."""
    old = _by_weight(old_A, old_B, old_scalings, old_counts)
    new = _by_weight(lora_A, lora_B, scalings, counts)
    jobs = _jobs(kernels.tile, weights, old, receipts, new)
    return _run(kernels, jobs, How(True, True, True), True)


def _by_weight(
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    scalings: Sequence[float],
    counts: Sequence[int],
) -> list[list[Adapter]]:
    flat = zip(lora_A, lora_B, scalings, strict=True)
    return [list(islice(flat, count)) for count in counts]


def _jobs(
    tile: tuple[int, int],
    weights: Sequence[Tensor],
    old: Sequence[list[Adapter]],
    receipts: Sequence[Tensor],
    new: Sequence[list[Adapter]],
) -> Iterator[Job]:
    for i, (weight, before, after) in enumerate(zip(weights, old, new, strict=True)):
        parts = tuple(t.contiguous() for t in receipts[PARTS * i : PARTS * (i + 1)])
        positions, bits, counts, sums = parts
        tiles, size = tiles_of(weight, tile), positions.numel()
        wanted = (torch.int16, RAW[weight.itemsize], torch.int32, torch.int64)
        fits = all(t.dtype == dtype for t, dtype in zip(parts, wanted, strict=True))
        fits = fits and counts.numel() == tiles and sums.numel() == 2 * tiles
        fits = fits and bits.numel() == size
        if not (fits and int(counts.sum()) == size and bool((counts >= 0).all())):
            raise _refused(State.NOT_RESTORED, i)
        yield Job(i, weight, as_read(before), as_read(after), parts)


def _run(kernels: Kernels, jobs: Iterable[Job], how: How, receipt: bool) -> Receipts:
    jobs = list(jobs)
    kinds: dict[Kind, list[Job]] = {}
    for job in jobs:
        kinds.setdefault(kind_of(job), []).append(job)
    batches = [Batch(kernels, kind, some, how) for kind, some in kinds.items()]
    made: list[tuple[list[int], Receipts]] = []
    try:
        for batch in batches:
            batch.run()
        bad: list[tuple[int, int]] = []
        for batch in batches:
            states, counts = batch.settle()
            bad += batch.refused(states)
            if not bad:
                own = batch.receipts(counts) if receipt else batch.nothing()
                made.append(([job.index for job in batch.jobs], own))
        if bad:
            index, state = min(bad)
            raise _refused(state, index)
        receipts = _in_order(made)
        mark_written(*(job.weight for job in jobs))
    except BaseException as error:
        failures = []
        for batch in batches:
            try:
                batch.take_back()
            except Exception as failure:  # noqa: PERF203
                failures.append(failure)
        if failures:
            raise RuntimeError(f"{error}; and not all could be undone: {failures[0]}") from error
        raise
    return receipts


def _in_order(made: list[tuple[list[int], Receipts]]) -> Receipts:
    """Receipts of several batches as those of one, in the order of the call's weights."""
    if len(made) == 1:
        return made[0][1]
    found: dict[int, tuple[Tensor, ...]] = {}
    for indices, (*parts, sizes) in made:
        shares = [sizes[:, column].tolist() for column in (0, 0, 1, 2)]
        split = (t.split(share) for t, share in zip(parts, shares, strict=True))
        found |= dict(zip(indices, zip(*split, sizes.split(1), strict=True), strict=True))
    positions, bits, counts, sums, sizes = (
        torch.cat([found[index][i] for index in sorted(found)]) for i in range(PARTS + 1)
    )
    return positions, bits, counts, sums, sizes


def _refused(state: int, index: int) -> Exception:
    """What is raised for a weight, whose place in the call is the error's ``index``."""
    errors = {
        State.NOT_FINITE: ValueError(
            "adapters: merging gives values that are not finite; the weight is unchanged"
        ),
        State.NOT_MERGED: RuntimeError(
            "weight: it is not the one that this receipt's merge left behind (edited since, or "
            "another layer's); nothing was changed"
        ),
        State.NOT_RESTORED: RuntimeError(
            "receipt: it does not give back the original weight here (its adapters or itself were "
            "edited); nothing was changed"
        ),
    }
    error = errors.get(state) or RuntimeError(f"merging: a tile was left in state {state}")
    error.index = index  # pyright: ignore[reportAttributeAccessIssue]
    return error
