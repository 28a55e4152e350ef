"""Merges whose receipts hold a copy of the weight: good on any machine and in any version."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastlora.backends.merge_lists import errors
from fastlora.backends.merge_lists.undo import Undo
from fastlora.backends.torch import merge as exact
from fastlora.functional.receipt import Adapter, MergeReceipt, columns, new_receipt
from fastlora.ops import call as ops

# What such a receipt names as its backend and kernel.
SNAPSHOT = "snapshot"


def merge(
    weights: list[Tensor], adapters: Sequence[Sequence[Adapter]], backend: str, undo: Undo
) -> list[MergeReceipt]:
    """Puts adapters[i] into weights[i], which are of one dtype and device."""
    before = [w.clone() for w in weights]
    for weight, copy in zip(weights, before, strict=True):
        undo.push(weight.copy_, copy)
    ops.call("merge_", weights, *columns(adapters), False, backend)
    return [_receipt(*each) for each in zip(weights, adapters, before, strict=True)]


def unmerge(weights: Sequence[Tensor], receipts: Sequence[MergeReceipt], undo: Undo | None) -> None:
    """Gives weights[i] the bits of its copy. Without undo: nothing else is to be done after it."""
    for weight, receipt in zip(weights, receipts, strict=True):
        if undo is not None:
            undo.push(weight.copy_, weight.clone())
        weight.copy_(_copy_of(receipt))


def swap(
    weights: Sequence[Tensor],
    receipts: Sequence[MergeReceipt],
    adapters: Sequence[Sequence[Adapter]],
    backends: Sequence[str],
    undo: Undo,
) -> list[MergeReceipt]:
    """Gives weights[i] the bits of its copy and puts adapters[i] in, on backends[i]."""
    fresh = []
    unmerge(weights, receipts, undo)
    for i, (weight, receipt) in enumerate(zip(weights, receipts, strict=True)):
        with errors.among([i]):
            ops.call("merge_", [weight], *columns([adapters[i]]), False, backends[i])
        fresh.append(_receipt(weight, adapters[i], _copy_of(receipt)))
    return fresh


def check(weights: Sequence[Tensor], receipts: Sequence[MergeReceipt]) -> None:
    """RuntimeError where a weight is not what its merge left, or its copy was edited."""
    for i, (weight, receipt) in enumerate(zip(weights, receipts, strict=True)):
        if receipt.snapshot is None:
            continue
        sums = (exact.checksum(weight), exact.checksum(receipt.snapshot))
        reasons = (errors.NOT_MERGED, exact.NOT_RESTORED)
        with errors.at(i):
            for actual, expected, reason in zip(sums, receipt.checksums, reasons, strict=True):
                if actual.item() != expected.item():
                    raise RuntimeError(reason)


def _copy_of(receipt: MergeReceipt) -> Tensor:
    assert receipt.snapshot is not None
    return receipt.snapshot


def _receipt(weight: Tensor, adapters: Sequence[Adapter], before: Tensor) -> MergeReceipt:
    *nothing, _ = exact.nothing(weight)
    parts = (*nothing, torch.stack((exact.checksum(weight), exact.checksum(before))))
    return new_receipt(weight, adapters, SNAPSHOT, SNAPSHOT, parts, before)
