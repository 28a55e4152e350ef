"""Packed projections and adapters in pages: how they lie, and how they run a part at a time.

A packed projection's columns are C slices (q, k and v of one weight), each with an A of its own:
lora_A (S, C * R, K), slice after slice, lora_B (S, N, R). In pages lora_A is (P, C * page, K) and
lora_B, as ops have it, (P, N, page) of any strides; a table (S, pages a slot) says which pages are
a slot's. ``kernels/`` reads both as they lie, and so does "cpu", a slice at a time. "torch" gathers
the pages of the adapters in use first: right for a test or a fallback, not fast.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Form(NamedTuple):
    """What the operands of a packed call say: where slices end, slots, ranks of each."""

    ends: tuple[int, ...]
    S: int
    R: int


class Slice(NamedTuple):
    """Of the columns begin to end, with ranks first to last of a slot's A."""

    begin: int
    end: int
    first: int
    last: int


def slices_of(ends: Sequence[int], R: int) -> Iterator[Slice]:
    for i, (begin, end) in enumerate(pairwise((0, *ends))):
        yield Slice(begin, end, i * R, (i + 1) * R)


def ends_of(slices: Sequence[int] | None, N: int) -> tuple[int, ...]:
    """Where each slice's columns end; ValueError unless their widths add up to N."""
    if slices is None:
        return (N,)
    if isinstance(slices, (str, bytes)) or not isinstance(slices, Sequence):
        raise TypeError(f"slices: expected a sequence of ints, got {type(slices).__name__}")
    widths = list(slices)
    if any(not isinstance(w, int) or isinstance(w, bool) for w in widths):
        raise TypeError(f"slices: expected a sequence of ints, got {widths}")
    if not widths or min(widths) < 1 or sum(widths) != N:
        raise ValueError(f"slices: expected widths from 1 that add up to {N}, got {widths}")
    return tuple(accumulate(widths))


def unshared(x: Tensor, y: Tensor) -> Tensor:
    """x as it is before a part of y is written: a copy where the two share memory."""
    return x.clone() if torch._C._is_alias_of(y, x) else x  # pyright: ignore[reportAttributeAccessIssue]


def gathered(
    lora_A: Tensor, lora_B: Tensor, table: Tensor, slices: int, slots: Tensor
) -> tuple[Tensor, Tensor]:
    """Of some slots A (n, C * R, K) and B (n, N, R) as the dense form has them."""
    pages = table[slots].long()
    there = (pages >= 0) & (pages < lora_A.shape[0])
    P, page, N = lora_A.shape[0], lora_B.shape[2], lora_B.shape[1]
    if P == 0:
        n, R = len(slots), table.shape[1] * page
        return lora_A.new_zeros(n, slices * R, lora_A.shape[2]), lora_B.new_zeros(n, N, R)
    at = pages.clamp(0, P - 1)
    A = lora_A.unflatten(1, (slices, page))[at]  # [n, pages, C, page, K]
    A = A.where(there[:, :, None, None, None], 0).transpose(1, 2).flatten(2, 3).flatten(1, 2)
    B = lora_B[at].where(there[:, :, None, None], 0)  # [n, pages, N, page]
    return A, B.transpose(1, 2).flatten(2)


def in_use(
    lora_A: Tensor,
    lora_B: Tensor,
    table: Tensor,
    slices: int,
    starts: Tensor,
    scalings: Tensor,
    ranks: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """The slots that rows use, dense: lora_A, lora_B, starts, scalings and ranks of those alone.

    Their rows keep their places, since the others have none.
    """
    slots = (starts[1:] > starts[:-1]).nonzero().flatten()
    A, B = gathered(lora_A, lora_B, table, slices, slots)
    starts = torch.cat([starts[slots], starts[-1:]])
    return A, B, starts, scalings[slots], None if ranks is None else ranks[slots]


def add_each(
    add: Callable[..., None],
    y: Tensor,
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    table: Tensor | None,
    ends: Sequence[int],
    ids: Tensor,
    order: Tensor,
    starts: Tensor,
    scalings: Tensor,
    ranks: Tensor | None,
    row_scales: Tensor | None,
    **how: Any,
) -> None:
    """``packed_lora_add_`` by a backend's ``multi_lora_add_``, a slice after the other."""
    if len(ends) > 1:
        x = unshared(x, y)
    if table is not None:
        paged = (lora_A, lora_B, table, len(ends), starts, scalings, ranks)
        lora_A, lora_B, starts, scalings, ranks = in_use(*paged)
    R = lora_B.shape[2]
    routing = (ids, order, starts, scalings, ranks, row_scales)
    h = x.new_empty(x.shape[0], R)
    for part in slices_of(ends, R):
        A, B = lora_A[:, part.first : part.last], lora_B[:, part.begin : part.end]
        add(y[:, part.begin : part.end], h, x, A, B, *routing, **how)
