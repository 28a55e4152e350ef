"""LoRA as functions: argument checks and autograd around one op each.

``y = x @ weight.T + bias + scaling * (dropout(x) @ lora_A.T) @ lora_B.T`` after Hu et al., "LoRA:
Low-Rank Adaptation of Large Language Models" (2021). Shape letters: M or T rows (tokens), K
in_features, N out_features, R rank, S adapter slots. Under autocast x, weight, bias are cast as
``torch.nn.functional.linear`` would cast them; adapters keep their dtype and so do their gradients.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as nnf

from fastlora import checks, dispatch, dropout, invariance, ops
from fastlora.autograd import LoRAAdd, LoRALinear, MultiLoRAAdd, MultiLoRALinear
from fastlora.grouping import RowGroups
from fastlora.receipt import Adapter, MergeReceipt, columns

__all__ = [
    "MergeReceipt",
    "RowGroups",
    "group_rows",
    "lora_add_",
    "lora_linear",
    "merge_",
    "multi_lora_add_",
    "multi_lora_linear",
    "unmerge_",
]

_ops = torch.ops.fastlora


def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    *,
    bias: Tensor | None = None,
    lora_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    training: bool = False,
) -> Tensor:
    """``x @ weight.T + bias + scaling * ((dropout(x) @ lora_A.T) @ lora_B.T + lora_bias)``.

    x (..., K), weight (N, K) and bias (N,) share a dtype (float16, bfloat16, float32, float64);
    lora_A (R, K), lora_B (N, R) and lora_bias (N,) share one of their own, float32 on a
    half-precision base being the usual choice. Returns (..., N) in x's dtype. Differentiable in
    every tensor, once. Dropout (``training=True``) touches the LoRA branch alone; its mask follows
    from a seed drawn from torch's generator and is regenerated in backward, never stored.

    Raises TypeError or ValueError naming the argument that does not fit.
    """
    x, weight, bias = checks.autocast(x, weight, bias)
    checks.linear(x, weight, lora_A, lora_B, bias, lora_bias)
    scaling, dropout_p = checks.scaling(scaling), checks.dropout(dropout_p)
    p, seed = _dropout(dropout_p, training, x)
    backend = invariance.marked(dispatch.choose("lora_linear", *_kind(x, lora_A)))
    args = (_rows(x), weight, bias, lora_A, lora_B, lora_bias, scaling, p, seed, backend)
    tracked = _tracked(x, weight, bias, lora_A, lora_B, lora_bias)
    y, _ = LoRALinear.apply(*args) if tracked else ops.call("lora_linear", *args)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], weight.shape[0])


def base_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ weight.T + bias``: torch's, or within ``batch_invariant`` that of a LoRA of no rank."""
    if not invariance.asked():
        return nnf.linear(x, weight, bias)
    N, K = weight.shape
    return lora_linear(x, weight, weight.new_empty(0, K), weight.new_empty(N, 0), 0.0, bias=bias)


def lora_add_(
    y: Tensor,
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    *,
    dropout_p: float = 0.0,
    training: bool = False,
) -> Tensor:
    """Adds ``scaling * (dropout(x) @ lora_A.T) @ lora_B.T`` to y in place and returns y.

    For bases that are not a plain weight: y (..., N) is any base layer's output for x (..., K), of
    the same dtype (under autocast x is cast to y's). Otherwise as ``lora_linear``; differentiable
    in y, x, lora_A, lora_B.
    """
    x = checks.autocast_to(x, y)
    checks.added(y, x, lora_A, lora_B)
    scaling, dropout_p = checks.scaling(scaling), checks.dropout(dropout_p)
    p, seed = _dropout(dropout_p, training, x)
    rows, tracked = _rows(x), _tracked(y, x, lora_A, lora_B)
    if tracked:
        rows = _kept(rows, y)
    h = _scratch(lora_A.shape[0], rows, lora_A, seed)
    backend = invariance.marked(dispatch.choose("lora_add_", *_kind(x, lora_A)))
    args = (y, h, rows, lora_A, lora_B, scaling, p, seed, backend)
    return LoRAAdd.apply(*args) if tracked else LoRAAdd.forward(*args)


def group_rows(adapter_ids: Tensor, num_slots: int) -> RowGroups:
    """Sorts the rows of a batch by adapter, once for every layer that sees the batch.

    adapter_ids: int32 or int64 (T,), (B,) or (B, L), values in [-1, num_slots), -1 = no adapter.
    Host ids out of range raise ValueError; on a device, which is not waited for, they count as -1.
    """
    checks.adapter_ids(adapter_ids, num_slots)
    backend = dispatch.choose("group_rows", adapter_ids.device)
    ids, order, starts = ops.call("group_rows", adapter_ids.reshape(-1), num_slots, backend)
    return RowGroups(ids, order, starts, num_slots, tuple(adapter_ids.shape))


def multi_lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    adapter_ids: Tensor | RowGroups,
    scalings: Tensor,
    *,
    bias: Tensor | None = None,
    ranks: Tensor | None = None,
    row_scales: Tensor | None = None,
) -> Tensor:
    """``x @ weight.T + bias`` plus, for each row, its own adapter's ``scaling * (x @ A.T) @ B.T``.

    x (T, K) with adapter_ids (T,), or x (B, L, K) with ids (B,) or (B, L), or what ``group_rows``
    made of them; -1 = no adapter. lora_A (S, R, K), lora_B (S, N, R); scalings float32 (S,); ranks
    int (S,): what lies past a slot's rank is ignored whatever it holds; row_scales float (T,) or of
    the ids' shape multiplies a row's adapter part. Differentiable in x, weight, bias, lora_A,
    lora_B.

    Raises TypeError or ValueError naming the argument that does not fit; ids as in ``group_rows``.
    """
    x, weight, bias = checks.autocast(x, weight, bias)
    checks.multi(x, weight, lora_A, lora_B, scalings, ranks, bias)
    checks.not_differentiable(scalings=scalings, row_scales=row_scales)
    groups = _groups(adapter_ids, x, lora_A.shape[0])
    routing = (*groups.tensors, scalings, ranks, _row_scales(row_scales, x))
    backend = invariance.marked(dispatch.choose("multi_lora_linear", *_kind(x, lora_A)))
    args = (_rows(x), weight, bias, lora_A, lora_B, *routing, backend)
    tracked = _tracked(x, weight, bias, lora_A, lora_B)
    y, _ = MultiLoRALinear.apply(*args) if tracked else ops.call("multi_lora_linear", *args)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], weight.shape[0])


def multi_lora_add_(
    y: Tensor,
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    adapter_ids: Tensor | RowGroups,
    scalings: Tensor,
    *,
    ranks: Tensor | None = None,
    row_scales: Tensor | None = None,
) -> Tensor:
    """Adds each row's adapter part to y in place, as in ``multi_lora_linear``; returns y."""
    x = checks.autocast_to(x, y)
    checks.multi_added(y, x, lora_A, lora_B, scalings, ranks)
    checks.not_differentiable(scalings=scalings, row_scales=row_scales)
    groups = _groups(adapter_ids, x, lora_A.shape[0])
    routing = (*groups.tensors, scalings, ranks, _row_scales(row_scales, x))
    rows, tracked = _rows(x), _tracked(y, x, lora_A, lora_B)
    if tracked:
        rows = _kept(rows, y)
    h = _scratch(lora_A.shape[1], rows, lora_A, *groups.tensors, ranks)
    backend = invariance.marked(dispatch.choose("multi_lora_add_", *_kind(x, lora_A)))
    args = (y, h, rows, lora_A, lora_B, *routing, backend)
    return MultiLoRAAdd.apply(*args) if tracked else MultiLoRAAdd.forward(*args)


@torch.no_grad()
def merge_(
    weight: Tensor, adapters: Sequence[Adapter], *, receipt: bool = True
) -> MergeReceipt | None:
    """``weight += sum of scaling * lora_B @ lora_A`` in place: float32 sums, one rounding.

    weight (N, K) of any strides keeps its ``data_ptr``; adapters: [(lora_A (R, K), lora_B (N, R),
    scaling), …]. The receipt gives every bit back through ``unmerge_``; without one the merge is
    for good. Nothing of the weight's size is allocated beside the receipt, which holds copies of
    the adapters and the elements that subtraction would not restore.

    Raises ValueError, the weight unchanged, when a merged value would not be finite.
    """
    checked = checks.adapters(weight, adapters)
    if receipt:
        # Copied before anything is written: it may be what memory does not suffice for.
        checked = [(A.clone(), B.clone(), scaling) for A, B, scaling in checked]
    backend = dispatch.choose("merge_", weight.device, weight.dtype)
    parts = _ops.merge_(weight, *columns(checked), receipt, backend)
    if not receipt:
        return None
    return MergeReceipt.make(weight, checked, backend, dispatch.merge_kernel(backend), parts)


@torch.no_grad()
def unmerge_(weight: Tensor, receipt: MergeReceipt) -> None:
    """Undoes the merge that ``receipt`` came from: weight (N, K) has every bit back.

    Raises TypeError or ValueError for another shape or dtype, RuntimeError when the weight is not
    the one that the merge left or cannot be restored exactly; the weight is unchanged then.
    """
    if not isinstance(receipt, MergeReceipt):
        raise TypeError(f"receipt: expected a MergeReceipt, got {type(receipt).__name__}")
    receipt.check(weight, dispatch.merge_kernel(receipt.backend))
    _ops.unmerge_(weight, *receipt.operands(weight.device), receipt.backend)


def _dropout(p: float, training: bool, x: Tensor) -> tuple[float, Tensor | None]:
    drops = training and dropout.threshold(p) > 0
    return (p, dropout.new_seed(x.device)) if drops else (0.0, None)


def _kind(x: Tensor, lora_A: Tensor) -> tuple[torch.device, torch.dtype, torch.dtype, int]:
    """What decides about the backend of a call."""
    return x.device, x.dtype, lora_A.dtype, lora_A.shape[-2]


def _rows(x: Tensor) -> Tensor:
    if x.dim() == 2:
        return x
    return x.flatten(0, -2) if x.dim() > 1 else x.unsqueeze(0)


def _kept(rows: Tensor, y: Tensor) -> Tensor:
    """x as backward will need it, although y is written: a copy where the two share memory."""
    checks.tracked_output(y)
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return rows
    shared = torch._C._is_alias_of(y, rows)  # pyright: ignore[reportAttributeAccessIssue]
    return rows.clone() if shared else rows


def _scratch(R: int, x: Tensor, *others: Tensor | None) -> Tensor:
    """An empty h (M, R); under vmap it is batched where anything is that it will be made of."""
    if not torch._C._are_functorch_transforms_active():
        return x.new_empty(x.shape[0], R)
    parts = [t.new_zeros((), dtype=x.dtype) for t in (x, *others) if t is not None]
    return torch.stack(parts).sum().expand(x.shape[0], R).clone()


def _tracked(*tensors: Tensor | None) -> bool:
    """Whether autograd must see the call: a Function costs a decode step more than the op does.

    Under torch.func, and in forward mode, tensors do not tell: there it always sees the call.
    """
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _groups(adapter_ids: Tensor | RowGroups, x: Tensor, num_slots: int) -> RowGroups:
    if not isinstance(adapter_ids, RowGroups):
        adapter_ids = group_rows(adapter_ids, num_slots)
    return checks.row_groups(adapter_ids, x, num_slots)


def _row_scales(row_scales: Tensor | None, x: Tensor) -> Tensor | None:
    return None if row_scales is None else checks.row_scales(row_scales, x)
