"""Owners of a tensor's elements: a row of the batch, nobody, or several rows at once.

An array of int32 with the tensor's number of dimensions, each of the tensor's size or, where the
owner does not change along it, of size 1: broadcast, it has an owner an element. None in an array's
place means that nobody owns anything, as of weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

NOBODY, MIXED = -1, -2
_ABOVE = np.iinfo(np.int32).max

Owners = np.ndarray[Any, np.dtype[np.int32]]


def fill_owner(owner: int, ndim: int) -> Owners:
    """Makes one owner for all of a tensor."""
    return np.full((1,) * ndim, owner, np.int32)


def spread_along(dim: int, owners: Sequence[int] | Owners, ndim: int) -> Owners:
    """Lays ``owners``, one an index of ``dim``, out for a tensor of ``ndim`` dimensions."""
    shape = [1] * ndim
    shape[dim] = len(owners)
    return compress(np.asarray(owners, np.int32).reshape(shape))


def align(o: Owners, ndim: int) -> Owners:
    """Adds dimensions of size 1 in front, as broadcasting does."""
    return o if o.ndim >= ndim else o.reshape((1,) * (ndim - o.ndim) + o.shape)


def join(*owners: Owners | None) -> Owners | None:
    """Joins the owners of elements that are computed of one another: the one owner, or MIXED."""
    joined: Owners | None = None
    for o in owners:
        if o is None or o is joined:
            continue
        if joined is None:
            joined = o
            continue
        ndim = max(o.ndim, joined.ndim)
        joined = _join_two(align(joined, ndim), align(o, ndim))
    return joined


def _join_two(a: Owners, b: Owners) -> Owners:
    if a.shape == b.shape and (a == b).all():
        return a
    both = np.where(a == b, a, np.int32(MIXED))
    return compress(np.where(a == NOBODY, b, np.where(b == NOBODY, a, both)))


def join_along(o: Owners | None, dims: Iterable[int]) -> Owners | None:
    """Joins owners along ``dims``, which stay, of size 1."""
    if o is None:
        return None
    dims = tuple(d for d in {d % max(o.ndim, 1) for d in dims} if o.ndim and o.shape[d] > 1)
    if not dims:
        return o
    high = o.max(dims, keepdims=True)
    low = np.where(o == NOBODY, _ABOVE, o).min(dims, keepdims=True)
    one = np.where(low == high, high, np.int32(MIXED))
    return np.where(low == _ABOVE, np.int32(NOBODY), one).astype(np.int32)


def compress(o: Owners) -> Owners:
    """Cuts to size 1 every dimension along which the owner does not change."""
    for dim, size in enumerate(o.shape):
        if size > 1:
            first = o[(slice(None),) * dim + (slice(0, 1),)]
            if (o == first).all():
                o = first
    return o


def expand(o: Owners, shape: Sequence[int], dims: Iterable[int]) -> Owners:
    """Expands owners to ``shape`` along ``dims``."""
    target = list(o.shape)
    for dim in dims:
        target[dim] = shape[dim]
    return np.broadcast_to(o, target)


def reshape(o: Owners, old: Sequence[int], new: Sequence[int]) -> Owners:
    """Moves the owners of a tensor of shape ``old`` into the shape ``new``, in order."""
    if math.prod(old) == 0 or o.size == 1:
        return fill_owner(int(o.flat[0]) if o.size else NOBODY, len(new))
    middle: list[int] = []
    expanded: list[int] = []
    i = j = 0
    while i < len(old) or j < len(new):
        # The fewest dimensions of both that hold as many elements.
        first, begin, a, b = i, j, 1, 1
        while True:
            if a == b and (i > first or j > begin) and a > 0:
                break
            if a <= b and i < len(old):
                a, i = a * old[i], i + 1
            elif j < len(new):
                b, j = b * new[j], j + 1
            else:
                a, i = a * old[i], i + 1
        if all(size == 1 for size in o.shape[first:i]):
            expanded += [1] * (i - first)
            middle += [1] * (j - begin)
        else:
            expanded += old[first:i]
            middle += new[begin:j]
    return compress(np.broadcast_to(o, expanded).reshape(middle))
