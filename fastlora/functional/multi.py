"""Many adapters in one batch, as functions; ``fastlora.functional`` has them as its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastlora.backends.packed import split_slices
from fastlora.backends.torch import products as library
from fastlora.backends.values import Adapters, Rows
from fastlora.functional import export as programs
from fastlora.functional.autograd import MultiLoRAAdd, MultiLoRALinear
from fastlora.functional.checks import linear as checks
from fastlora.functional.checks import multi as checks_multi
from fastlora.functional.row_groups import RowGroups, rows_of
from fastlora.functional.rows import as_rows, copy_rows_back, is_tracked, keep_input, new_scratch
from fastlora.ops import call as ops
from fastlora.ops import dispatch, invariance


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

    - x (T, K), or (B, L, K)
    - adapter_ids: (T,), (B,) or (B, L), -1 for no adapter; or what ``group_rows`` made of them
    - lora_A (S, R, K), lora_B (S, N, R), scalings float32 (S,): S slots of adapters
    - ranks int (S,): what lies past a slot's rank is ignored, whatever it holds; below 0 counts as
      0, above R as R
    - row_scales float (T,), or of x's first dimensions: multiplies a row's adapter part
    - slices: widths of the C parts of a packed projection (q, k, v), which add up to N. Each part
      has an A of its own: lora_A is (S, C * R, K), part after part, lora_B (S, N, R) as before
    - page_table int32 (S, pages a slot), for slots of different sizes: adapters lie in P pages of
      ranks, lora_A (P, C * page, K), lora_B (P, page, N). Slot s has rank i in row ``i % page`` of
      page ``page_table[s, i // page]``; an entry that is no page holds nothing. B's pages are
      rank-major, unlike lora_B. Not differentiable: call under no_grad

    Differentiable in x, weight, bias, lora_A, lora_B. Raises TypeError or ValueError naming the
    argument that does not fit, for ids as ``group_rows`` does. A scaling that is not finite and
    that rows use raises on the backends "cpu" and "torch"; "triton", which does not wait for the
    device, gives those rows NaN.
    """
    x, weight, bias = checks.autocast(x, weight, bias)
    checks.not_differentiable(scalings=scalings, row_scales=row_scales)
    adapters = checks_multi.linear(
        x, weight, bias, lora_A, lora_B, scalings, ranks, slices, page_table
    )
    rows = rows_of(x, adapter_ids, scalings, ranks, row_scales)
    tracked = is_tracked(x, weight, bias, lora_A, lora_B)
    if page_table is not None:
        _refuse_tracked(tracked)
    op = "packed_lora_linear" if adapters.ends and not tracked else "multi_lora_linear"
    kind = (x.device, x.dtype, lora_A.dtype, adapters.count_ranks())
    invariant, backend = invariance.asked(), dispatch.choose(op, *kind)
    matrix = as_rows(x)
    nobody = isinstance(adapter_ids, RowGroups) and adapter_ids.nobody
    if nobody and backend == "triton" and not (tracked or invariant):
        # The library's product is all there is to do, and no kernel of ours does it better.
        y = library.linear(matrix, weight, bias)
    elif op == "packed_lora_linear":
        y = ops.call(op, matrix, weight, bias, *adapters, *rows, invariant, backend)
    elif adapters.ends:
        parts = [
            _linear(
                matrix,
                weight[columns],
                None if bias is None else bias[columns],
                part,
                rows,
                invariant,
                backend,
                tracked,
            )
            for columns, part in split_slices(adapters)
        ]
        y = torch.cat(parts, -1)
    else:
        y = _linear(matrix, weight, bias, adapters, rows, invariant, backend, tracked)
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

    - y (..., N): any base layer's output for x
    - x (..., K): of y's dtype; under autocast it is cast to that

    Differentiable in y, x, lora_A, lora_B. Everything else, errors too, is as there.
    """
    x = checks.autocast_to(x, y)
    checks.not_differentiable(scalings=scalings, row_scales=row_scales)
    adapters = checks_multi.added(y, x, lora_A, lora_B, scalings, ranks, slices, page_table)
    rows = rows_of(x, adapter_ids, scalings, ranks, row_scales)
    tracked = is_tracked(y, x, lora_A, lora_B)
    if page_table is not None:
        _refuse_tracked(tracked)
    op = "packed_lora_add_" if adapters.ends and not tracked else "multi_lora_add_"
    kind = (x.device, x.dtype, lora_A.dtype, adapters.count_ranks())
    invariant, backend = invariance.asked(), dispatch.choose(op, *kind)
    matrix = as_rows(x)
    if op == "packed_lora_add_":
        matrix_y = as_rows(y)
        ops.call(op, matrix_y, matrix, *adapters, *rows, invariant, backend)
        return copy_rows_back(y, matrix_y)
    if not adapters.ends:
        return _add_(y, matrix, adapters, rows, invariant, backend, tracked)
    if len(adapters.ends) > 1:
        matrix = keep_input(matrix, y)
    for columns, part in split_slices(adapters):
        _add_(y[..., columns], matrix, part, rows, invariant, backend, tracked)
    return y


def _linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    adapters: Adapters,
    rows: Rows,
    invariant: bool,
    backend: str,
    tracked: bool,
) -> Tensor:
    """The op of one slice's dense adapters, as a Function, or as an op of a program, if need be."""
    args = (x, weight, bias, adapters.lora_A, adapters.lora_B, *rows, invariant, backend)
    if programs.written():
        return programs.call("multi_lora_linear", *args)
    y, _ = MultiLoRALinear.apply(*args) if tracked else ops.call("multi_lora_linear", *args)
    return y


def _add_(
    y: Tensor,
    x: Tensor,
    adapters: Adapters,
    rows: Rows,
    invariant: bool,
    backend: str,
    tracked: bool,
) -> Tensor:
    """As ``_linear``; y (..., N) is returned."""
    if tracked:
        x = keep_input(x, y)
    A, B = adapters.lora_A, adapters.lora_B
    h = new_scratch(A.shape[1], x, A, rows.ids, rows.order, rows.starts, rows.ranks)
    args = (y, h, x, A, B, *rows, invariant, backend)
    if programs.written():
        programs.call("multi_lora_add_", *args)
        return y
    return MultiLoRAAdd.apply(*args) if tracked else MultiLoRAAdd.forward(*args)


def _refuse_tracked(tracked: bool) -> None:
    """Refuses pages that autograd must see: it cannot."""
    if tracked:
        raise ValueError(
            "page_table: adapters in pages are not differentiable, nor mapped over: call under "
            "torch.no_grad(), outside of torch.func"
        )
