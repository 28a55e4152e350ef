"""Adapters into any number of weights and out of them: a group of weights an op, all or none.

What ``functional/merge.py`` and whole models call. An error about one weight has its place in the
call as its ``index``, and no name yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from fastlora.backends.merge_lists import errors
from fastlora.backends.merge_lists.operands import flatten_receipts, split_receipts
from fastlora.backends.merge_lists.undo import Undo, all_or_none
from fastlora.functional import snapshots
from fastlora.functional.checks import merge as checks
from fastlora.functional.receipt import Adapter, Columns, MergeReceipt, columns, new_receipt
from fastlora.ops import call as ops
from fastlora.ops import dispatch

_Value = TypeVar("_Value")


class _Group(NamedTuple):
    """Weights of one call, by their places in it, that one op takes: their receipts are alike."""

    backend: str
    device: torch.device
    snapshot: bool
    places: list[int]

    def pick(self, values: Sequence[_Value]) -> list[_Value]:
        return [values[place] for place in self.places]


@torch.no_grad()
def merge(
    weights: Sequence[Tensor],
    adapters: Sequence[Sequence[Adapter]],
    receipt: bool,
    snapshot: bool,
) -> list[MergeReceipt | None]:
    """Puts adapters[i] into weights[i]; their receipts, if any."""
    adapters = checks.adapters_of_all(weights, adapters)
    backends = [_backend(w, some) for w, some in zip(weights, adapters, strict=True)]
    groups = _groups(weights, backends, [snapshot] * len(weights))
    return _merge(groups, weights, adapters, receipt)


@torch.no_grad()
def remerge(weights: Sequence[Tensor], receipts: Sequence[MergeReceipt]) -> list[MergeReceipt]:
    """Merges into weights[i] again what receipts[i] says was merged; their new receipts.

    The bits are those of then: the receipt's backend does it, whatever is asked for by now.
    """
    moved = [receipt.on(w.device) for w, receipt in zip(weights, receipts, strict=True)]
    adapters = checks.adapters_of_all(weights, [receipt.adapters for receipt in moved])
    backends = [
        receipt.backend if receipt.snapshot is None else _backend(w, some)
        for w, some, receipt in zip(weights, adapters, receipts, strict=True)
    ]
    groups = _groups(weights, backends, [r.snapshot is not None for r in receipts])
    fresh = _merge(groups, weights, adapters, receipt=True)
    return [receipt for receipt in fresh if receipt is not None]


def _merge(
    groups: Sequence[_Group],
    weights: Sequence[Tensor],
    adapters: Sequence[Sequence[Adapter]],
    receipt: bool,
) -> list[MergeReceipt | None]:
    # Copies too where a factor lies within a weight: changed with it, it could not be had back.
    if receipt or checks.shared(weights, adapters):
        adapters = _copied(adapters)
    receipts: list[MergeReceipt | None] = [None] * len(weights)
    with all_or_none() as undo:
        for group in groups:
            members, factors = group.pick(weights), group.pick(adapters)
            with errors.among(group.places):
                if group.snapshot:
                    made = snapshots.merge(members, factors, group.backend, undo)
                elif receipt or len(groups) > 1:
                    made = _merge_group(group, members, factors, undo)
                else:
                    made = []
                    ops.call("merge_", members, *columns(factors), False, group.backend)
            if receipt:
                for place, of_weight in zip(group.places, made, strict=True):
                    receipts[place] = of_weight
        return receipts


@torch.no_grad()
def unmerge(weights: Sequence[Tensor], receipts: Sequence[MergeReceipt]) -> None:
    """Takes out of weights[i] what receipts[i] says was merged into it."""
    receipts = checks.receipts_of_all(weights, receipts)
    snapshots.check(weights, receipts)
    with all_or_none() as undo:
        for group in _groups_of(receipts, weights):
            members, old = group.pick(weights), group.pick(receipts)
            if group.snapshot:
                # A weight alone needs no second copy: nothing can fail after it.
                snapshots.unmerge(members, old, undo if len(weights) > 1 else None)
                continue
            factors = columns(r.adapters for r in old)
            with errors.among(group.places):
                ops.call("unmerge_", members, *factors, _parts(old), group.backend)
            undo.push(ops.call, "merge_", members, *factors, False, group.backend)


@torch.no_grad()
def swap(
    weights: Sequence[Tensor],
    receipts: Sequence[MergeReceipt],
    adapters: Sequence[Sequence[Adapter]],
) -> list[MergeReceipt]:
    """Takes out of weights[i] what receipts[i] says, puts adapters[i] in; their new receipts."""
    receipts = checks.receipts_of_all(weights, receipts)
    adapters = _copied(checks.adapters_of_all(weights, adapters))
    snapshots.check(weights, receipts)
    fresh = list(receipts)
    with all_or_none() as undo:
        for group in _groups_of(receipts, weights):
            members, old, new = group.pick(weights), group.pick(receipts), group.pick(adapters)
            with errors.among(group.places):
                if group.snapshot:
                    backends = [_backend(w, some) for w, some in zip(members, new, strict=True)]
                    made = snapshots.swap(members, old, new, backends, undo)
                else:
                    made = _swap_group(group, members, old, new, undo)
            for place, receipt in zip(group.places, made, strict=True):
                fresh[place] = receipt
        return fresh


def _merge_group(
    group: _Group, weights: list[Tensor], adapters: Sequence[Sequence[Adapter]], undo: Undo
) -> list[MergeReceipt]:
    factors = columns(adapters)
    made = ops.call("merge_", weights, *factors, True, group.backend)
    undo.push(_unmerge_group, group, weights, factors, made)
    return _receipts(group, weights, adapters, made)


def _unmerge_group(
    group: _Group, weights: list[Tensor], factors: Columns, made: Sequence[Tensor]
) -> None:
    ops.call("unmerge_", weights, *factors, flatten_receipts(made), group.backend)


def _swap_group(
    group: _Group,
    weights: list[Tensor],
    receipts: Sequence[MergeReceipt],
    adapters: Sequence[Sequence[Adapter]],
    undo: Undo,
) -> list[MergeReceipt]:
    old, new = columns(r.adapters for r in receipts), columns(adapters)
    made = ops.call("swap_", weights, *old, _parts(receipts), *new, group.backend)
    undo.push(_swap_back, group, weights, new, made, old)
    return _receipts(group, weights, adapters, made)


def _swap_back(
    group: _Group, weights: list[Tensor], new: Columns, made: Sequence[Tensor], old: Columns
) -> None:
    ops.call("swap_", weights, *new, flatten_receipts(made), *old, group.backend)


def _groups_of(receipts: Sequence[MergeReceipt], weights: Sequence[Tensor]) -> list[_Group]:
    copied = [receipt.snapshot is not None for receipt in receipts]
    return _groups(weights, [receipt.backend for receipt in receipts], copied)


def _groups(
    weights: Sequence[Tensor], backends: Sequence[str], copied: Sequence[bool]
) -> list[_Group]:
    """Weights by backend, device and dtype, and whether a copy of theirs is their receipt."""
    groups: dict[tuple[str, torch.device, torch.dtype, bool], _Group] = {}
    for i, (weight, backend, snapshot) in enumerate(zip(weights, backends, copied, strict=True)):
        group = _Group(backend, weight.device, snapshot, [])
        kind = backend, weight.device, weight.dtype, snapshot
        groups.setdefault(kind, group).places.append(i)
    return list(groups.values())


def _backend(weight: Tensor, adapters: Sequence[Adapter]) -> str:
    # On a CPU factors of any dtype become float32 ones first.
    lora = adapters[0][0].dtype if adapters and weight.device.type != "cpu" else None
    return dispatch.choose("merge_", weight.device, weight.dtype, lora)


def _copied(adapters: Sequence[Sequence[Adapter]]) -> list[list[Adapter]]:
    """Copies, made before anything is written: memory may not suffice for them."""
    tensors = [t for some in adapters for A, B, _ in some for t in (A, B)]
    copies = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in tensors]
    if tensors:
        torch._foreach_copy_(copies, tensors)  # pyright: ignore[reportPrivateImportUsage]
    each_copy = iter(copies)
    return [[(next(each_copy), next(each_copy), s) for _, _, s in some] for some in adapters]


def _parts(receipts: Sequence[MergeReceipt]) -> list[Tensor]:
    return [part for receipt in receipts for part in receipt.parts]


def _receipts(
    group: _Group,
    weights: Sequence[Tensor],
    adapters: Sequence[Sequence[Adapter]],
    made: Sequence[Tensor],
) -> list[MergeReceipt]:
    """A receipt a weight from what an op returned for all."""
    kernel = dispatch.merge_kernel(group.backend, group.device)
    return [
        new_receipt(weight, some, group.backend, kernel, parts)
        for weight, some, parts in zip(weights, adapters, split_receipts(made), strict=True)
    ]
