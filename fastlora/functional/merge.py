"""Adapters into weights in place, out of them to the bit, and one for another.

``W' = round(W + sum of scaling * lora_B @ lora_A)``: float32 sums, one rounding. Every function
leaves all its weights as they were when it raises.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

from torch import Tensor

from fastlora.backends.merge_lists import errors
from fastlora.functional import merge_groups
from fastlora.functional.receipt import Adapter, MergeReceipt


def merge_(
    weight: Tensor, adapters: Sequence[Adapter], *, receipt: bool = True, snapshot: bool = False
) -> MergeReceipt | None:
    """``weight += sum of scaling * lora_B @ lora_A`` in place: float32 sums, one rounding.

    - weight (N, K): of any strides; it keeps its ``data_ptr``
    - adapters: [(lora_A (R, K), lora_B (N, R), scaling), …]
    - receipt: gives every bit back through ``unmerge_``; without one the merge is for good
    - snapshot: the receipt holds a copy of the weight, good on any machine and in any version

    Without a snapshot nothing of the weight's size is allocated: the receipt holds copies of the
    adapters and the elements that subtraction would not restore. Raises TypeError or ValueError
    naming what does not fit (a sharded or quantized weight, say), ValueError when a merged value
    would not be finite; the weight is unchanged then.
    """
    return foreach_merge_([weight], [adapters], receipt=receipt, snapshot=snapshot)[0]


def unmerge_(weight: Tensor, receipt: MergeReceipt) -> None:
    """Undoes the merge that ``receipt`` came from: weight (N, K) has every bit back.

    Raises TypeError or ValueError for another shape or dtype, RuntimeError when the weight is not
    the one that the merge left or cannot be restored exactly; the weight is unchanged then.
    """
    foreach_unmerge_([weight], [receipt])


def swap_(weight: Tensor, receipt: MergeReceipt, adapters: Sequence[Adapter]) -> MergeReceipt:
    """Takes out of weight (N, K) what ``receipt`` says is merged, and merges ``adapters`` instead.

    The bits are those of ``unmerge_`` and ``merge_``; a GPU's kernel moves the weight once. Returns
    the new receipt, a snapshot if the old one was. Errors are those of the two; the weight is
    unchanged then.
    """
    return foreach_swap_([weight], [receipt], [adapters])[0]


def foreach_merge_(
    weights: Sequence[Tensor],
    adapters: Sequence[Sequence[Adapter]],
    *,
    receipt: bool = True,
    snapshot: bool = False,
) -> list[MergeReceipt | None]:
    """``merge_`` of adapters[i] into weights[i], all or none; on a GPU in few launches.

    Beside ``merge_``'s errors, ValueError where two weights share memory. An error about one weight
    of several begins with ``weights[i]:``, and has ``index`` i.
    """
    if snapshot and not receipt:
        raise ValueError("snapshot: expected receipt=True with it, got receipt=False")
    with _named(weights):
        return merge_groups.merge(weights, adapters, receipt, snapshot)


def foreach_unmerge_(weights: Sequence[Tensor], receipts: Sequence[MergeReceipt]) -> None:
    """``unmerge_`` of receipts[i] from weights[i], all or none; errors as ``foreach_merge_``'s."""
    with _named(weights):
        merge_groups.unmerge(weights, receipts)


def foreach_swap_(
    weights: Sequence[Tensor],
    receipts: Sequence[MergeReceipt],
    adapters: Sequence[Sequence[Adapter]],
) -> list[MergeReceipt]:
    """``swap_`` of receipts[i] for adapters[i] in weights[i], all or none.

    Errors as ``foreach_merge_``'s.
    """
    with _named(weights):
        return merge_groups.swap(weights, receipts, adapters)


def _named(weights: Sequence[Tensor]) -> AbstractContextManager[None]:
    """An error about one weight of several begins with its place; one alone needs no name."""
    several = len(weights) > 1
    return errors.named([f"weights[{i}]" if several else "" for i in range(len(weights))])
