"""What can be merged into: plain weights with memory of their own, and adapters that fit them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastlora.backends.dtypes import FLOATS
from fastlora.backends.merge_lists import errors
from fastlora.functional.checks import linear as checks
from fastlora.functional.receipt import Adapter, MergeReceipt
from fastlora.inspection.plain_tensors import explain_unreadable, is_plain
from fastlora.ops import availability, dispatch


def adapters(weight: Tensor, given: Sequence[Adapter]) -> list[Adapter]:
    """Adapters that fit weight (N, K), detached, their scalings as numbers."""
    N, K = own_elements(weight)
    if isinstance(given, Tensor) or not isinstance(given, Sequence):
        raise TypeError(
            f"adapters: expected [(lora_A, lora_B, scaling), …], got {type(given).__name__}"
        )
    checked = []
    for item in given:
        if not isinstance(item, Sequence) or len(item) != 3:
            raise TypeError(
                f"adapters: expected (lora_A, lora_B, scaling), got {type(item).__name__}"
            )
        lora_A, lora_B, factor = item
        for name, part in (("lora_A", lora_A), ("lora_B", lora_B)):
            if hasattr(part, "placements"):
                raise TypeError(f"{name}: got a DTensor, sharded over processes: gather it first")
        checks.adapter(lora_A, lora_B, N, K, weight)
        checked.append((lora_A.detach(), lora_B.detach(), checks.scaling(factor)))
    return checked


def adapters_of_all(
    weights: Sequence[Tensor], lists: Sequence[Sequence[Adapter]]
) -> list[list[Adapter]]:
    """Adapters of every weight, of which no two may share memory."""
    if len(weights) != len(lists):
        raise ValueError(f"adapters: expected one list a weight, {len(weights)}, got {len(lists)}")
    checked = []
    for i, (weight, given) in enumerate(zip(weights, lists, strict=True)):
        with errors.at(i):
            checked.append(adapters(weight, given))
    disjoint(weights)
    return checked


def receipts_of_all(
    weights: Sequence[Tensor], receipts: Sequence[MergeReceipt]
) -> list[MergeReceipt]:
    """Receipts that can be undone here, as far as one can tell without looking at a weight.

    Their tensors are where their weights are.
    """
    if len(weights) != len(receipts):
        raise ValueError(f"receipts: expected one a weight, {len(weights)}, got {len(receipts)}")
    moved = []
    for i, (weight, receipt) in enumerate(zip(weights, receipts, strict=True)):
        if not isinstance(receipt, MergeReceipt):
            raise TypeError(f"receipt: expected a MergeReceipt, got {type(receipt).__name__}")
        with errors.at(i):
            receipt.check(weight)
            moved.append(receipt.on(weight.device))
            adapters(weight, moved[-1].adapters)
            if receipt.snapshot is None:
                _kernel(weight, receipt)
    disjoint(weights)
    return moved


def _kernel(weight: Tensor, receipt: MergeReceipt) -> None:
    """RuntimeError unless the arithmetic that made a receipt is to be had here."""
    reason = availability.cannot(receipt.backend, weight.device, weight.dtype)
    if reason is not None:
        raise RuntimeError(f"receipt: made by backend {receipt.backend!r}, but {reason}")
    receipt.check_kernel(dispatch.merge_kernel(receipt.backend, weight.device))


def own_elements(weight: Tensor) -> tuple[int, int]:
    """A weight (N, K) that can be written in place: plain numbers, each with memory of its own."""
    checks.tensor("weight", weight)
    kind = type(weight).__name__
    if hasattr(weight, "placements"):
        raise TypeError(f"weight: a {kind} is sharded over processes; gather it before merging")
    found = explain_unreadable(weight)
    if found is None and not is_plain(weight):
        found = f"a {kind}, which has none"
    if found is not None:
        raise TypeError(
            f"weight: expected a plain tensor with numbers, got {found}: dequantize it before "
            "merging, or keep the adapter beside it"
        )
    if weight.dtype.itemsize == 1:
        raise TypeError(
            f"weight: expected one of {checks.names(FLOATS)}, got {weight.dtype}, which is "
            "quantized: dequantize it before merging, or keep the adapter beside it"
        )
    N, K = checks.matrix_of(weight)
    (row, column), whole = weight.stride(), weight.numel() > 0
    by_rows = N < 2 or row > (K - 1) * column
    by_columns = K < 2 or column > (N - 1) * row
    alone = (by_rows and (K < 2 or column > 0)) or (by_columns and (N < 2 or row > 0))
    if whole and not alone:
        raise ValueError(
            f"weight: expected elements of their own, got overlapping ones: shape "
            f"{tuple(weight.shape)} and strides {weight.stride()}"
        )
    return N, K


def disjoint(weights: Sequence[Tensor]) -> None:
    """ValueError where two weights share memory: what is merged into one would be in the other."""
    # By their first address: only those that begin before another ends can share any.
    spans = [(*span(w), i) for i, w in enumerate(weights) if w.numel() and not w.is_meta]
    open_spans: list[tuple[int, int, int]] = []
    for begin, end, i in sorted(spans):
        open_spans = [other for other in open_spans if other[1] > begin]
        for _, _, j in open_spans:
            if overlap(weights[j], weights[i]):
                raise ValueError(
                    f"weights[{max(i, j)}]: expected memory of its own, got some that is "
                    f"weights[{min(i, j)}]'s too"
                )
        open_spans.append((begin, end, i))


def shared(weights: Sequence[Tensor], adapters: Sequence[Sequence[Adapter]]) -> bool:
    """Whether a factor lies in the storage of a weight."""
    storages = {w.untyped_storage().data_ptr() for w in weights if w.numel()}
    factors = (t for some in adapters for A, B, _ in some for t in (A, B) if t.numel())
    return any(t.untyped_storage().data_ptr() in storages for t in factors)


def span(t: Tensor) -> tuple[int, int]:
    """The addresses of a tensor's first byte and of the one after its last."""
    last = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), t.data_ptr() + (last + 1) * t.itemsize


def overlap(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have an element in common; slices of one tensor need not."""
    if one.numel() == 0 or other.numel() == 0:
        return False
    ends = (span(one), span(other))
    start, end = min(first for first, _ in ends), max(last for _, last in ends)
    if ends[0][1] <= ends[1][0] or ends[1][1] <= ends[0][0]:
        return False
    if one.itemsize != other.itemsize or any((first - start) % one.itemsize for first, _ in ends):
        return True
    # Interleaved: marked one by one.
    marks = torch.zeros((end - start) // one.itemsize, dtype=torch.bool, device="cpu")
    views = [
        marks.as_strided(t.shape, t.stride(), (first - start) // t.itemsize)
        for t, (first, _) in zip((one, other), ends, strict=True)
    ]
    views[0].fill_(True)
    return bool(views[1].any())
