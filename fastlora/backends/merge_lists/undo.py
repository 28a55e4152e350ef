"""A backend's merge of one weight for any number of weights: all of them or none.

Adapters come flat, ``counts`` of them a weight. A receipt is four tensors (positions, bits, counts,
checksums); those of all weights come back one after another in four, with a fifth (weights, 3) that
says how many elements, tiles and checksums are whose.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from fastlora.backends import interrupts

PARTS = 4  # of a receipt
# Every lora_A, every lora_B, every scaling.
Factors = tuple[list[Tensor], list[Tensor], list[float]]
Receipts = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def lifted(
    merge: Callable[..., Sequence[Tensor]], unmerge: Callable[..., None]
) -> tuple[Callable[..., Receipts], Callable[..., None], Callable[..., Receipts]]:
    """The ops merge_, unmerge_ and swap_ from those of one weight, one weight after another.

    merge(weight, *factors, receipt) returns a receipt's parts; unmerge(weight, *factors, *parts).
    """

    def merge_(
        weights: Sequence[Tensor],
        lora_A: Sequence[Tensor],
        lora_B: Sequence[Tensor],
        scalings: Sequence[float],
        counts: Sequence[int],
        receipt: bool,
    ) -> Receipts:
        # Of several weights the first can only be had back with a receipt, should the last fail.
        noted = receipt or len(weights) > 1
        made: list[Sequence[Tensor]] = []
        with all_or_none() as done:
            each = _by_weight(lora_A, lora_B, scalings, counts)
            for i, (weight, factors) in enumerate(zip(weights, each, strict=True)):
                with _of(i):
                    parts = list(merge(weight, *factors, noted))
                if noted:
                    done.append(lambda w=weight, f=factors, p=parts: unmerge(w, *f, *p))
                made.append(parts if receipt else [t[:0] for t in parts])
                interrupts.check()
            return _together(made)

    def unmerge_(
        weights: Sequence[Tensor],
        lora_A: Sequence[Tensor],
        lora_B: Sequence[Tensor],
        scalings: Sequence[float],
        counts: Sequence[int],
        receipts: Sequence[Tensor],
    ) -> None:
        with all_or_none() as done:
            each = _by_weight(lora_A, lora_B, scalings, counts)
            for i, (weight, factors) in enumerate(zip(weights, each, strict=True)):
                with _of(i):
                    unmerge(weight, *factors, *_receipt(receipts, i))
                done.append(lambda w=weight, f=factors: merge(w, *f, False))
                interrupts.check()

    def swap_(
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
        made: list[Sequence[Tensor]] = []
        with all_or_none() as done:
            before = _by_weight(old_A, old_B, old_scalings, old_counts)
            after = _by_weight(lora_A, lora_B, scalings, counts)
            for i, (weight, old, new) in enumerate(zip(weights, before, after, strict=True)):
                with _of(i):
                    unmerge(weight, *old, *_receipt(receipts, i))
                    done.append(lambda w=weight, f=old: merge(w, *f, False))
                    parts = list(merge(weight, *new, True))
                    done.append(lambda w=weight, f=new, p=parts: unmerge(w, *f, *p))
                made.append(parts)
                interrupts.check()
            return _together(made)

    return merge_, unmerge_, swap_


@contextmanager
def all_or_none() -> Iterator[list[Callable[[], Any]]]:
    """Ways back, taken last first when what is inside fails: each of them, whatever others do.

    RuntimeError, with the cause, where one of them has failed.
    """
    done: list[Callable[[], Any]] = []
    with interrupts.deferred():
        try:
            yield done
            interrupts.check()
        except BaseException as error:
            failures = []
            for back in reversed(done):
                try:
                    back()
                except Exception as failure:  # noqa: PERF203
                    failures.append(failure)
            if failures:
                raise RuntimeError(
                    f"{error}; and not all could be undone: {failures[0]}"
                ) from error
            raise


@contextmanager
def _of(index: int) -> Iterator[None]:
    """An error in here says by its ``index`` which weight it is about."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        error.index = index  # pyright: ignore[reportAttributeAccessIssue]
        raise


def apart(receipts: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
    """Each weight's own receipt, four views."""
    *parts, sizes = receipts
    elements, tiles, sums = (column.tolist() for column in sizes.unbind(1))
    shares = (elements, elements, tiles, sums)
    return list(zip(*(t.split(n) for t, n in zip(parts, shares, strict=True)), strict=True))


def _together(made: Sequence[Sequence[Tensor]]) -> Receipts:
    flat = [[t.reshape(-1) for t in parts] for parts in made]
    sizes = [[parts[i].numel() for i in (0, 2, 3)] for parts in flat]
    positions, bits, counts, sums = (
        some[0] if len(some) == 1 else torch.cat(some) for some in zip(*flat, strict=True)
    )
    return positions, bits, counts, sums, torch.tensor(sizes, dtype=torch.int64, device="cpu")


def _by_weight(
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    scalings: Sequence[float],
    counts: Sequence[int],
) -> list[Factors]:
    A, B, factors = iter(lora_A), iter(lora_B), iter(scalings)
    return [(list(islice(A, n)), list(islice(B, n)), list(islice(factors, n))) for n in counts]


def _receipt(receipts: Sequence[Tensor], index: int) -> Sequence[Tensor]:
    return receipts[PARTS * index : PARTS * (index + 1)]
