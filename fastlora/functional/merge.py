"""Adapters into weights in place, out of them to the bit, and one for another.

``W' = round(W + sum of scaling * lora_B @ lora_A)``: float32 sums, one rounding. Every function
leaves all its weights as they were when it raises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from fastlora.backends.merge_lists import undo as each
from fastlora.backends.torch import merge as exact
from fastlora.functional.checks import merge as checks_merge
from fastlora.functional.receipt import Adapter, MergeReceipt, columns
from fastlora.ops import availability, dispatch
from fastlora.ops import call as ops


class _Group(NamedTuple):
    backend: str
    device: torch.device
    dtype: torch.dtype


def merge_(
    weight: Tensor, adapters: Sequence[Adapter], *, receipt: bool = True, snapshot: bool = False
) -> MergeReceipt | None:
    """``weight += sum of scaling * lora_B @ lora_A`` in place: float32 sums, one rounding.

    weight (N, K) of any strides keeps its ``data_ptr``; adapters: [(lora_A (R, K), lora_B (N, R),
    scaling), …]. The receipt gives every bit back through ``unmerge_``; without one the merge is
    for good. Nothing of the weight's size is allocated beside the receipt, which holds copies of
    the adapters and the elements that subtraction would not restore. snapshot: the receipt holds a
    copy of the weight instead, good on any machine and in any version.

    Raises TypeError or ValueError naming what does not fit (a sharded or quantized weight, say),
    ValueError when a merged value would not be finite; the weight is unchanged then.
    """
    return foreach_merge_([weight], [adapters], receipt=receipt, snapshot=snapshot)[0]


def unmerge_(weight: Tensor, receipt: MergeReceipt) -> None:
    """Undoes the merge that ``receipt`` came from: weight (N, K) has every bit back.

    Raises TypeError or ValueError for another shape or dtype, RuntimeError when the weight is not
    the one that the merge left or cannot be restored exactly; the weight is unchanged then.
    """
    foreach_unmerge_([weight], [receipt])


def swap_(weight: Tensor, receipt: MergeReceipt, adapters: Sequence[Adapter]) -> MergeReceipt:
    """Takes out what ``receipt`` says is merged into weight (N, K) and merges ``adapters`` instead.

    The bits are those of ``unmerge_`` and ``merge_``; a GPU's kernel moves the weight once. Returns
    the new receipt, a snapshot if the old one was. Errors as theirs; the weight is unchanged then.
    """
    return foreach_swap_([weight], [receipt], [adapters])[0]


@torch.no_grad()
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
    weights, checked = _checked(weights, adapters)
    backends = [_backend(w, some) for w, some in zip(weights, checked, strict=True)]
    return _merge(weights, checked, backends, receipt, snapshot)


@torch.no_grad()
def foreach_remerge_(
    weights: Sequence[Tensor], receipts: Sequence[MergeReceipt]
) -> list[MergeReceipt]:
    """What receipts[i] says was merged, merged into weights[i] again as it was; new receipts.

    The bits are those of then: the receipt's backend does it, whatever is asked for by now.
    """
    held = [receipt.on(w.device) for w, receipt in zip(weights, receipts, strict=True)]
    weights, checked = _checked(weights, [receipt.adapters for receipt in held])
    copied = [receipt.snapshot is not None for receipt in receipts]
    made: dict[int, MergeReceipt | None] = {}
    with each.all_or_none() as done:
        for snapshot in {*copied}:
            where = [i for i, each_copied in enumerate(copied) if each_copied == snapshot]
            own, given = [weights[i] for i in where], [checked[i] for i in where]
            backends = [
                _backend(w, a) if snapshot else receipts[i].backend
                for i, w, a in zip(where, own, given, strict=True)
            ]
            fresh = _merge(own, given, backends, True, snapshot)
            done.append(lambda o=own, r=fresh: foreach_unmerge_(o, r))  # pyright: ignore
            made |= dict(zip(where, fresh, strict=True))
    return [made[i] for i in range(len(weights))]  # pyright: ignore[reportReturnType]


def _merge(
    weights: list[Tensor],
    checked: list[list[Adapter]],
    backends: Sequence[str],
    receipt: bool,
    snapshot: bool,
) -> list[MergeReceipt | None]:
    # Copies too where a factor lies within a weight: changed with it, it could not be had back.
    copies = _copied(checked) if receipt or checks_merge.shared(weights, checked) else checked
    groups = _groups(backends, weights)
    found: list[MergeReceipt | None] = [None] * len(weights)
    noted = not snapshot and (receipt or len(groups) > 1)
    with each.all_or_none() as done:
        for (backend, device, _), where in groups.items():
            own, given = [weights[i] for i in where], columns(copies[i] for i in where)
            before = [w.clone() for w in own] if snapshot else []
            done += [_way_back(*pair) for pair in zip(own, before, strict=False)]
            with _named(where, len(weights)):
                made = ops.call("merge_", own, *given, noted, backend)
            if noted:
                done.append(
                    lambda o=own, g=given, m=made, b=backend: ops.call(
                        "unmerge_", o, *g, _flat(m), b
                    )
                )
            parts = each.apart(made)
            kernel = dispatch.merge_kernel(backend, device)
            for j, i in enumerate(where):
                if snapshot:
                    found[i] = _snapshot(weights[i], copies[i], before[j])
                elif receipt:
                    found[i] = _made(weights[i], copies[i], backend, kernel, parts[j])
        return found


@torch.no_grad()
def foreach_unmerge_(weights: Sequence[Tensor], receipts: Sequence[MergeReceipt]) -> None:
    """``unmerge_`` of receipts[i] from weights[i], all or none; errors as ``foreach_merge_``'s."""
    weights, receipts = _merged(weights, receipts)
    _check_snapshots(weights, receipts)
    with each.all_or_none() as done:
        for (backend, *_), where in _groups([r.backend for r in receipts], weights).items():
            own, held = [weights[i] for i in where], [receipts[i] for i in where]
            if held[0].snapshot is not None:
                for weight, receipt in zip(own, held, strict=True):
                    if len(weights) > 1:
                        done.append(_way_back(weight))
                    _restore(weight, receipt)
                continue
            given, parts = columns(r.adapters for r in held), [t for r in held for t in r.parts]
            with _named(where, len(weights)):
                ops.call("unmerge_", own, *given, parts, backend)
            done.append(lambda o=own, g=given, b=backend: ops.call("merge_", o, *g, False, b))


@torch.no_grad()
def foreach_swap_(
    weights: Sequence[Tensor],
    receipts: Sequence[MergeReceipt],
    adapters: Sequence[Sequence[Adapter]],
) -> list[MergeReceipt]:
    """``swap_`` of receipts[i] for adapters[i] in weights[i], all or none.

    Errors as ``foreach_merge_``'s.
    """
    weights, receipts = _merged(weights, receipts)
    weights, checked = _checked(weights, adapters)
    _check_snapshots(weights, receipts)
    copies, found = _copied(checked), list(receipts)
    with each.all_or_none() as done:
        for (backend, device, _), where in _groups([r.backend for r in receipts], weights).items():
            own, held = [weights[i] for i in where], [receipts[i] for i in where]
            if held[0].snapshot is not None:
                for i, weight, receipt in zip(where, own, held, strict=True):
                    done.append(_way_back(weight))
                    before = _restore(weight, receipt)
                    with _named([i], len(weights)):
                        by = _backend(weight, checked[i])
                        ops.call("merge_", [weight], *columns([checked[i]]), False, by)
                    found[i] = _snapshot(weight, copies[i], before)
                continue
            old, new = columns(r.adapters for r in held), columns(copies[i] for i in where)
            parts = [t for r in held for t in r.parts]
            with _named(where, len(weights)):
                made = ops.call("swap_", own, *old, parts, *new, backend)
            done.append(
                lambda o=own, a=new, m=made, b=old, by=backend: ops.call(
                    "swap_", o, *a, _flat(m), *b, by
                )
            )
            made = each.apart(made)
            kernel = dispatch.merge_kernel(backend, device)
            for j, i in enumerate(where):
                found[i] = _made(weights[i], copies[i], backend, kernel, made[j])
        return found


def _checked(
    weights: Sequence[Tensor], adapters: Sequence[Sequence[Adapter]]
) -> tuple[list[Tensor], list[list[Adapter]]]:
    if len(weights) != len(adapters):
        raise ValueError(
            f"adapters: expected one list a weight, {len(weights)}, got {len(adapters)}"
        )
    found = []
    for i, (weight, given) in enumerate(zip(weights, adapters, strict=True)):
        with _named([i], len(weights), index=0):
            found.append(checks_merge.adapters(weight, given))
    checks_merge.disjoint(weights)
    return list(weights), found


def _merged(
    weights: Sequence[Tensor], receipts: Sequence[MergeReceipt]
) -> tuple[list[Tensor], list[MergeReceipt]]:
    """Receipts that could be undone here, as far as can be said without looking at a weight.

    Their tensors are where their weights are.
    """
    if len(weights) != len(receipts):
        raise ValueError(f"receipts: expected one a weight, {len(weights)}, got {len(receipts)}")
    moved = []
    for i, (weight, receipt) in enumerate(zip(weights, receipts, strict=True)):
        if not isinstance(receipt, MergeReceipt):
            raise TypeError(f"receipt: expected a MergeReceipt, got {type(receipt).__name__}")
        with _named([i], len(weights), index=0):
            receipt.check(weight)
            moved.append(receipt.on(weight.device))
            checks_merge.adapters(weight, moved[-1].adapters)
            if receipt.snapshot is not None:
                continue
            reason = availability.cannot(receipt.backend, weight.device, weight.dtype)
            if reason is not None:
                raise RuntimeError(f"receipt: made by backend {receipt.backend!r}, but {reason}")
            receipt.check_kernel(dispatch.merge_kernel(receipt.backend, weight.device))
    checks_merge.disjoint(weights)
    return list(weights), moved


def _check_snapshots(weights: Sequence[Tensor], receipts: Sequence[MergeReceipt]) -> None:
    for i, (weight, receipt) in enumerate(zip(weights, receipts, strict=True)):
        if receipt.snapshot is None:
            continue
        sums = (exact.checksum(weight), exact.checksum(receipt.snapshot))
        with _named([i], len(weights), index=0):
            for found, wanted, said in zip(
                sums, receipt.checksums, (exact.NOT_MERGED, exact.NOT_RESTORED), strict=True
            ):
                if found.item() != wanted.item():
                    raise RuntimeError(said)


def _flat(made: Sequence[Tensor]) -> list[Tensor]:
    """Receipts as they come from an op, as others take them."""
    return [t for own in each.apart(made) for t in own]


def _copied(adapters: list[list[Adapter]]) -> list[list[Adapter]]:
    """Copied before anything is written: it may be what memory does not suffice for."""
    tensors = [t for some in adapters for A, B, _ in some for t in (A, B)]
    copies = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in tensors]
    if tensors:
        torch._foreach_copy_(copies, tensors)  # pyright: ignore[reportPrivateImportUsage]
    each_copy = iter(copies)
    return [[(next(each_copy), next(each_copy), s) for _, _, s in some] for some in adapters]


def _backend(weight: Tensor, adapters: Sequence[Adapter]) -> str:
    # On a CPU factors of any dtype become float32 ones first.
    lora = adapters[0][0].dtype if adapters and weight.device.type != "cpu" else None
    return dispatch.choose("merge_", weight.device, weight.dtype, lora)


def _groups(backends: Sequence[str], weights: Sequence[Tensor]) -> dict[_Group, list[int]]:
    """The weights that one op takes, by their places: receipts of one have one kind of bits."""
    found: dict[_Group, list[int]] = {}
    for i, (backend, weight) in enumerate(zip(backends, weights, strict=True)):
        found.setdefault(_Group(backend, weight.device, weight.dtype), []).append(i)
    return found


def _way_back(weight: Tensor, before: Tensor | None = None) -> Callable[[], object]:
    copy = weight.clone() if before is None else before
    return lambda: weight.copy_(copy)


def _restore(weight: Tensor, receipt: MergeReceipt) -> Tensor:
    """From a snapshot, which is returned."""
    assert receipt.snapshot is not None
    weight.copy_(receipt.snapshot)
    return receipt.snapshot


# The backend of a receipt that is a copy.
SNAPSHOT = "snapshot"


def _snapshot(weight: Tensor, adapters: Sequence[Adapter], before: Tensor) -> MergeReceipt:
    *nothing, _ = exact.nothing(weight)
    parts = (*nothing, torch.stack((exact.checksum(weight), exact.checksum(before))))
    return _made(weight, adapters, SNAPSHOT, SNAPSHOT, parts, before)


def _made(
    weight: Tensor,
    adapters: Sequence[Adapter],
    backend: str,
    kernel: str,
    parts: Sequence[Tensor],
    snapshot: Tensor | None = None,
) -> MergeReceipt:
    shape, (positions, bits, counts, checksums) = (weight.shape[0], weight.shape[1]), parts
    return MergeReceipt(
        shape, weight.dtype, backend, kernel, tuple(adapters),
        positions, bits, counts, checksums, snapshot,
    )  # fmt: skip


@contextmanager
def _named(where: Sequence[int], weights: int, index: int | None = None) -> Iterator[None]:
    """Of several weights, an error about one begins with its place in the call."""
    try:
        yield
    except (TypeError, ValueError, RuntimeError) as error:
        found = getattr(error, "index", index)
        if found is None or weights == 1:
            raise
        raised = type(error)(f"weights[{where[found]}]: {error}")
        raised.index = where[found]  # pyright: ignore[reportAttributeAccessIssue]
        raise raised from error
