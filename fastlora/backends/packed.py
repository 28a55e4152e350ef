"""Packed projections and adapters in pages: how they lie, and how they run a slice at a time.

A packed projection's columns are C slices (q, k and v of one weight), each with an A of its own:
lora_A (S, C * R, K), slice after slice, lora_B (S, N, R). In pages lora_A is (P, C * page, K) and
lora_B, as ops have it, (P, N, page) of any strides; a table (S, pages a slot) says which pages are
a slot's. ``kernels/`` reads both as they lie, and so does "cpu", a slice at a time. "torch" gathers
the pages of the adapters in use first: right for a test or a fallback, not fast.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from fastlora.backends.in_place import copy_if_shared
from fastlora.backends.values import Adapters, Rows


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


def split_slices(adapters: Adapters) -> Iterator[tuple[slice, Adapters]]:
    """The columns of each slice of a projection, and the adapters of those columns alone."""
    lora_A, lora_B, table, ends = adapters
    R = lora_B.shape[2]
    for i, (begin, end) in enumerate(pairwise((0, *ends))):
        columns = slice(begin, end)
        yield columns, Adapters(lora_A[:, i * R : (i + 1) * R], lora_B[:, columns], table)


def gather_pages(adapters: Adapters, slots: Tensor) -> Adapters:
    """Some slots of adapters in pages, dense: lora_A (n, C * R, K) and lora_B (n, N, R)."""
    lora_A, lora_B, table, ends = adapters
    assert table is not None
    pages, slices = table[slots].long(), len(ends)
    P, page, N = lora_A.shape[0], lora_B.shape[2], lora_B.shape[1]
    if P == 0:
        n, R = len(slots), table.shape[1] * page
        none = lora_A.new_zeros(n, slices * R, lora_A.shape[2]), lora_B.new_zeros(n, N, R)
        return Adapters(*none, ends=ends)
    is_page = (pages >= 0) & (pages < P)
    pages = pages.clamp(0, P - 1)
    A = lora_A.unflatten(1, (slices, page))[pages]  # [n, pages, C, page, K]
    A = A.where(is_page[:, :, None, None, None], 0).transpose(1, 2).flatten(2, 3).flatten(1, 2)
    B = lora_B[pages].where(is_page[:, :, None, None], 0)  # [n, pages, N, page]
    return Adapters(A, B.transpose(1, 2).flatten(2), ends=ends)


def gather_used(adapters: Adapters, rows: Rows) -> tuple[Adapters, Rows]:
    """The slots that rows use, dense, and the rows by the numbers that those slots then have.

    The rows keep their places in ``order``, since the other slots have none; ``ids`` are left.
    """
    starts, ranks = rows.starts, rows.ranks
    slots = (starts[1:] > starts[:-1]).nonzero().flatten()
    used = rows._replace(
        starts=torch.cat([starts[slots], starts[-1:]]),
        scalings=rows.scalings[slots],
        ranks=None if ranks is None else ranks[slots],
    )
    return gather_pages(adapters, slots), used


def add_by_slices(
    add: Callable[..., None], y: Tensor, x: Tensor, adapters: Adapters, rows: Rows, *options: Any
) -> None:
    """Does ``packed_lora_add_`` with a backend's ``multi_lora_add_``, one slice after the other."""
    if len(adapters.ends) > 1:
        x = copy_if_shared(x, y)
    if adapters.table is not None:
        adapters, rows = gather_used(adapters, rows)
    h = x.new_empty(x.shape[0], adapters.count_ranks())
    for columns, part in split_slices(adapters):
        add(y[:, columns], h, x, part, rows, *options)
