"""Many adapters in one batch, as functions; ``fastlora.functional`` has them as its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastlora.backends.packed import Form, slices_of
from fastlora.backends.torch import products as library
from fastlora.functional import export as programs
from fastlora.functional.autograd import MultiLoRAAdd, MultiLoRALinear
from fastlora.functional.checks import linear as checks
from fastlora.functional.checks import multi as checks_multi
from fastlora.functional.row_groups import RowGroups
from fastlora.functional.rows import as_rows, is_tracked, kept, kind_of, scratch, written_back
from fastlora.ops import call as ops
from fastlora.ops import dispatch, invariance


def group_rows(adapter_ids: Tensor, num_slots: int) -> RowGroups:
    """Sorts the rows of a batch by adapter, once for every layer that sees the batch.

    adapter_ids: int32 or int64 (T,), (B,) or (B, L), values in [-1, num_slots), -1 = no adapter.
    Raises TypeError for other dtypes, ValueError for other shapes and for host ids out of range; on
    a device, which is not waited for, those count as -1.
    """
    checks_multi.adapter_ids(adapter_ids, num_slots)
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
    slices: Sequence[int] | None = None,
    page_table: Tensor | None = None,
) -> Tensor:
    """``x @ weight.T + bias`` plus, for each row, its own adapter's ``scaling * (x @ A.T) @ B.T``.

    x (T, K) with adapter_ids (T,), or x (B, L, K) with ids (B,) or (B, L), or what ``group_rows``
    made of them; -1 = no adapter. lora_A (S, R, K), lora_B (S, N, R); scalings float32 (S,); ranks
    int (S,): what lies past a slot's rank is ignored whatever it holds, a rank below 0 is 0, one
    above R is R; row_scales float (T,), or of x's first dimensions, multiplies a row's adapter
    part. Differentiable in x, weight, bias, lora_A, lora_B.

    slices: widths of the C parts of a packed projection (q, k, v), which add up to N. Each part has
    an A of its own: lora_A is (S, C * R, K), part after part, and lora_B (S, N, R) as before.

    page_table: int32 (S, pages a slot), for slots of different sizes. Adapters then lie in P pages
    of ranks: lora_A (P, C * page, K), lora_B (P, page, N), and slot s has rank i in row
    ``i % page`` of page ``page_table[s, i // page]``; an entry that is no page holds nothing. Mind
    that B's pages are rank-major, unlike lora_B. Not differentiable: call under no_grad.

    Raises TypeError or ValueError naming the argument that does not fit. Ids as in ``group_rows``;
    a scaling that is not finite raises too where rows use it, on the backends "cpu" and "torch":
    "triton", which does not wait for the device, gives those rows NaN.
    """
    x, weight, bias = checks.autocast(x, weight, bias)
    checks.not_differentiable(scalings=scalings, row_scales=row_scales)
    if slices is not None or page_table is not None:
        rest = (lora_A, lora_B, scalings, ranks, slices, page_table)
        form = checks_multi.packed(x, weight, bias, *rest)
        groups = _groups(adapter_ids, x, form.S)
        rest = (x, weight, lora_A, lora_B, groups, scalings, bias, ranks, row_scales)
        return _packed_linear(form, page_table, *rest)
    checks_multi.multi(x, weight, lora_A, lora_B, scalings, ranks, bias)
    groups = _groups(adapter_ids, x, lora_A.shape[0])
    routing = (*groups.tensors, scalings, ranks, _row_scales(row_scales, x))
    backend = dispatch.choose("multi_lora_linear", *kind_of(x, lora_A))
    invariant = invariance.asked()
    tracked = is_tracked(x, weight, bias, lora_A, lora_B)
    if groups.nobody and backend == "triton" and not (tracked or invariant):
        # The library's product is all there is to do, and no kernel of ours does it better.
        return _base(x, weight, bias)
    args = (as_rows(x), weight, bias, lora_A, lora_B, *routing, invariant, backend)
    if programs.written():
        y = programs.call("multi_lora_linear", *args)
    else:
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
    slices: Sequence[int] | None = None,
    page_table: Tensor | None = None,
) -> Tensor:
    """Adds each row's adapter part to y in place, as in ``multi_lora_linear``; returns y.

    y (..., N): any base layer's output for x (..., K), of the same dtype (under autocast x is cast
    to y's). Differentiable in y, x, lora_A, lora_B; all else, errors too, as there.
    """
    x = checks.autocast_to(x, y)
    checks.not_differentiable(scalings=scalings, row_scales=row_scales)
    if slices is not None or page_table is not None:
        rest = (lora_A, lora_B, scalings, ranks, slices, page_table)
        form = checks_multi.packed_added(y, x, *rest)
        groups = _groups(adapter_ids, x, form.S)
        rest = (y, x, lora_A, lora_B, groups, scalings, ranks, row_scales)
        return _packed_add_(form, page_table, *rest)
    checks_multi.multi_added(y, x, lora_A, lora_B, scalings, ranks)
    groups = _groups(adapter_ids, x, lora_A.shape[0])
    routing = (*groups.tensors, scalings, ranks, _row_scales(row_scales, x))
    rows, tracked = as_rows(x), is_tracked(y, x, lora_A, lora_B)
    if tracked:
        rows = kept(rows, y)
    h = scratch(lora_A.shape[1], rows, lora_A, *groups.tensors, ranks)
    backend = dispatch.choose("multi_lora_add_", *kind_of(x, lora_A))
    invariant = invariance.asked()
    args = (y, h, rows, lora_A, lora_B, *routing, invariant, backend)
    if programs.written():
        programs.call("multi_lora_add_", *args)
        return y
    return MultiLoRAAdd.apply(*args) if tracked else MultiLoRAAdd.forward(*args)


def _base(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = library.linear(as_rows(x), weight, bias)
    return y.view(*x.shape[:-1], weight.shape[0])


def _packed_linear(
    form: Form,
    page_table: Tensor | None,
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    groups: RowGroups,
    scalings: Tensor,
    bias: Tensor | None,
    ranks: Tensor | None,
    row_scales: Tensor | None,
) -> Tensor:
    if _differentiable(page_table, x, weight, bias, lora_A, lora_B):
        parts = []
        for part in slices_of(form.ends, form.R):
            columns = slice(part.begin, part.end)
            A, B = lora_A[:, part.first : part.last], lora_B[:, columns]
            own = None if bias is None else bias[columns]
            given = (x, weight[columns], A, B, groups, scalings)
            y = multi_lora_linear(*given, bias=own, ranks=ranks, row_scales=row_scales)
            parts.append(y)
        return torch.cat(parts, -1)
    routing = (*groups.tensors, scalings, ranks, _row_scales(row_scales, x))
    kind = (x.device, x.dtype, lora_A.dtype, form.R)
    backend = dispatch.choose("packed_lora_linear", *kind)
    invariant = invariance.asked()
    if groups.nobody and backend == "triton" and not invariant:
        return _base(x, weight, bias)
    lora_B = lora_B if page_table is None else lora_B.transpose(1, 2)
    args = (
        as_rows(x),
        weight,
        bias,
        lora_A,
        lora_B,
        page_table,
        form.ends,
        *routing,
        invariant,
        backend,
    )
    y = ops.call("packed_lora_linear", *args)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], weight.shape[0])


def _packed_add_(
    form: Form,
    page_table: Tensor | None,
    y: Tensor,
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    groups: RowGroups,
    scalings: Tensor,
    ranks: Tensor | None,
    row_scales: Tensor | None,
) -> Tensor:
    if _differentiable(page_table, y, x, lora_A, lora_B):
        if len(form.ends) > 1:
            x = kept(x, y)
        for part in slices_of(form.ends, form.R):
            A, B = lora_A[:, part.first : part.last], lora_B[:, part.begin : part.end]
            given = (y[..., part.begin : part.end], x, A, B, groups, scalings)
            multi_lora_add_(*given, ranks=ranks, row_scales=row_scales)
        return y
    routing = (*groups.tensors, scalings, ranks, _row_scales(row_scales, x))
    kind = (x.device, x.dtype, lora_A.dtype, form.R)
    backend = dispatch.choose("packed_lora_add_", *kind)
    invariant = invariance.asked()
    lora_B = lora_B if page_table is None else lora_B.transpose(1, 2)
    rows = as_rows(y)
    args = (rows, as_rows(x), lora_A, lora_B, page_table, form.ends, *routing, invariant, backend)
    ops.call("packed_lora_add_", *args)
    return written_back(y, rows)


def _differentiable(page_table: Tensor | None, *tensors: Tensor | None) -> bool:
    """Whether autograd must see the call, which it can of slices alone."""
    if not is_tracked(*tensors):
        return False
    if page_table is not None:
        raise ValueError(
            "page_table: adapters in pages are not differentiable, nor mapped over: call under "
            "torch.no_grad(), outside of torch.func"
        )
    return True


def _groups(adapter_ids: Tensor | RowGroups, x: Tensor, num_slots: int) -> RowGroups:
    if not isinstance(adapter_ids, RowGroups):
        adapter_ids = group_rows(adapter_ids, num_slots)
    return checks_multi.row_groups(adapter_ids, x, num_slots)


def _row_scales(row_scales: Tensor | None, x: Tensor) -> Tensor | None:
    return None if row_scales is None else checks_multi.row_scales(row_scales, x)
