"""Indices, masks and scatters: elements moved to where values say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastlora.rows.op import Found, Op, Rule
from fastlora.rows.owners import (
    MIXED,
    NOBODY,
    Owners,
    aligned,
    compressed,
    constant,
    full,
    join,
)


def _placed(o: Owners | None, begin: int, count: int, ndim: int) -> Owners | None:
    """Of ``count`` dimensions, as those from ``begin`` on of ``ndim``."""
    if o is None:
        return None
    o = aligned(o, count)
    return o.reshape((1,) * begin + o.shape + (1,) * (ndim - begin - count))


class Indices:
    """Of ``x[indices]``: which dimensions of x they are for, and where theirs are in the result."""

    def __init__(self, given: Sequence[Tensor | None]) -> None:
        self.given, self.dims, at = list(given), [], 0
        blocks: list[int] = []
        for i, index in enumerate(given):
            taken = 1
            if index is not None:
                mask = index.dtype in (torch.bool, torch.uint8)
                taken = index.dim() if mask else 1
                self.dims += range(at, at + taken)
                blocks.append(i)
            at += taken
        together = blocks == list(range(blocks[0], blocks[-1] + 1)) if blocks else True
        self.begin = (self.dims[0] if self.dims else 0) if together else 0
        counts = [
            1 if t.dtype in (torch.bool, torch.uint8) else t.dim() for t in given if t is not None
        ]
        self.count = max(counts, default=0)

    def numpy(self, op: Op) -> tuple[Any, ...]:
        values: list[Any] = [slice(None) if t is None else op.values(t) for t in self.given]
        return tuple(v.astype(bool) if getattr(v, "dtype", None) == np.uint8 else v for v in values)

    def owners(self, op: Op) -> Owners | None:
        """Of what is taken from nobody's: those of who asks."""
        found = []
        for t in self.given:
            o = op.own(t)
            if o is not None and t is not None and t.dtype == torch.bool and t.dim() > 1:
                o = constant(MIXED, 1)
            found.append(o)
        return join(*found)


def _taken(op: Op, x: Tensor, given: Sequence[Tensor | None]) -> Found:
    o, indices, ndim = op.own(x), Indices(given), op.outs[0].dim()
    if o is None:
        return _placed(indices.owners(op), indices.begin, indices.count, ndim)
    if all(o.shape[d] == 1 for d in indices.dims):
        o = o.squeeze(tuple(indices.dims))
        begin = indices.begin
        return o.reshape(o.shape[:begin] + (1,) * indices.count + o.shape[begin:])
    return compressed(full(o, x.shape, indices.dims)[indices.numpy(op)])


def _indexed(op: Op) -> Found:
    return _taken(op, op.args[0], op.args[1])


def _index_selected(op: Op) -> Found:
    x, index = op.args[0], op.arg("index")
    dim = op.arg("dim") % max(x.dim(), 1)
    return _taken(op, x, [None] * dim + [index.reshape(-1)])


def _gathered(op: Op) -> Found:
    x, index = op.args[0], op.arg("index")
    dim, o = op.arg("dim") % max(x.dim(), 1), op.own(x)
    if o is None or not o.ndim:
        return op.own(index) if o is None else o
    sizes = tuple(slice(0, n if s > 1 else 1) for n, s in zip(index.shape, o.shape, strict=True))
    if o.shape[dim] == 1:
        return o[sizes]
    everywhere = np.broadcast_to(o, tuple(x.shape))
    cut = tuple(slice(None) if d == dim else slice(0, n) for d, n in enumerate(index.shape))
    return compressed(np.take_along_axis(everywhere[cut], op.values(index), dim))


def _ordered(op: Op) -> Found:
    """sort, topk: what the indices say has come from where they say."""
    o, dim = op.own(op.args[0]), op.arg("dim")
    if o is None or not o.ndim or o.shape[-1 if dim is None else dim] == 1:
        return o
    dim = (-1 if dim is None else dim) % o.ndim
    everywhere = np.broadcast_to(o, tuple(op.args[0].shape))
    return compressed(np.take_along_axis(everywhere, op.values(op.outs[-1]), dim))


def _mask_selected(op: Op) -> Found:
    x, mask = torch.broadcast_tensors(op.args[0], op.arg("mask"))
    o = op.own(op.args[0])
    o = op.own(op.arg("mask")) if o is None else o
    if o is None:
        return None
    return compressed(np.broadcast_to(aligned(o, x.dim()), tuple(x.shape))[op.values(mask)])


def _nonzero(op: Op) -> Found:
    x, o = op.args[0], op.own(op.args[0])
    if o is None:
        return None
    places = op.values(x) != 0
    found = np.broadcast_to(o, tuple(x.shape))[places]
    return compressed(found[:, None]) if op.outs[0].dim() == 2 else compressed(found)


def _put(op: Op, x: Tensor, given: Sequence[Tensor | None], values: Any, adds: bool) -> Found:
    """``x[given] = values``, or ``+=``."""
    mine, theirs, indices = op.own(x), op.own(values), Indices(given)
    asks = indices.owners(op)
    if theirs is None and (mine is not None or asks is None):
        return mine
    count = indices.count + x.dim() - len(indices.dims)
    if theirs is None:
        theirs = _placed(asks, indices.begin, indices.count, count)
    assert theirs is not None
    theirs = aligned(theirs, count)
    begin, end = indices.begin, indices.begin + indices.count
    if all(size == 1 for size in theirs.shape[begin:end]):
        shape = list(theirs.shape[:begin] + theirs.shape[end:])
        for dim in sorted(indices.dims):
            shape.insert(dim, 1)
        one = join(mine, theirs.reshape(shape))
        if one is not None and not (one == MIXED).any():
            return one
    before = constant(NOBODY, x.dim()) if mine is None else mine
    before = np.broadcast_to(before, tuple(x.shape))
    places = indices.numpy(op)
    after = np.full(x.shape, NOBODY, np.int32)
    after[places] = theirs
    if adds:
        # All who come to one place must be the same.
        low = np.full(x.shape, np.iinfo(np.int32).max, np.int32)
        np.minimum.at(low, places, theirs)
        high = np.full(x.shape, np.iinfo(np.int32).min, np.int32)
        np.maximum.at(high, places, theirs)
        came = after != NOBODY
        after = np.where(came & (low != high), np.int32(MIXED), after)
        found = join(before, after)
        assert found is not None
        return compressed(found)
    return compressed(np.where(after == NOBODY, before, after))


def _index_put(op: Op) -> Found:
    return _put(op, op.args[0], op.args[1], op.args[2], bool(op.arg("accumulate")))


def _index_copied(op: Op) -> Found:
    x = op.args[0]
    given: list[Tensor | None] = [*[None] * (op.args[1] % x.dim()), op.arg("index")]
    value = op.arg("source")
    return _put(op, x, given, value, "add" in op.func._schema.name)


def _scattered(op: Op) -> Found:
    x, index, src = op.args[0], op.arg("index"), op.arg("src")
    dim, mine, theirs = op.arg("dim") % max(x.dim(), 1), op.own(x), op.own(src)
    if theirs is None:
        theirs = op.own(index) if mine is None else None
    if theirs is None:
        return mine
    if theirs.ndim and theirs.shape[dim] == 1:
        same = all(n in (1, size) for n, size in zip(theirs.shape, x.shape, strict=True))
        one = join(mine, theirs) if same else None
        if one is not None and not (one == MIXED).any():
            return one
    name = op.func._schema.name
    if "add" in name or "reduce" in name or op.arg("reduce") is not None:
        return constant(MIXED, x.dim())  # several may come to one place
    where = np.broadcast_to(theirs, tuple(index.shape) if theirs.size == 1 else theirs.shape)
    shape = tuple(index.shape)
    where = np.broadcast_to(where, tuple(max(a, 1) for a in where.shape))
    where = where if where.shape == shape else _cut(where, shape)
    before = np.broadcast_to(constant(NOBODY, x.dim()) if mine is None else mine, tuple(x.shape))
    after = np.full(before.shape, NOBODY, np.int32)
    np.put_along_axis(after[_part(shape, dim)], op.values(index), where, dim)
    return compressed(np.where(after == NOBODY, before, after))


def _part(shape: tuple[int, ...], dim: int) -> tuple[slice, ...]:
    return tuple(slice(None) if d == dim else slice(0, n) for d, n in enumerate(shape))


def _cut(o: Owners, shape: tuple[int, ...]) -> Owners:
    o = o[tuple(slice(0, n) if s > 1 else slice(None) for n, s in zip(shape, o.shape, strict=True))]
    return np.broadcast_to(o, shape)


def _mask_scattered(op: Op) -> Found:
    x, mask, source = op.args[0], op.arg("mask"), op.arg("source")
    mine, theirs = op.own(x), op.own(source)
    if theirs is None:
        return mine
    places = np.broadcast_to(op.values(mask), tuple(x.shape))
    before = np.broadcast_to(constant(NOBODY, x.dim()) if mine is None else mine, tuple(x.shape))
    after = before.copy()
    given = np.broadcast_to(theirs, tuple(source.shape)).reshape(-1)[: int(places.sum())]
    after[places] = np.where(given == NOBODY, before[places], given)
    return compressed(after)


def _copied(op: Op) -> Found:
    mine, theirs = op.own(op.args[0]), op.own(op.args[1])
    if theirs is None:
        return mine
    theirs = aligned(theirs, op.args[0].dim())
    # Constants are nobody's, and take no place from its owner.
    return theirs if mine is None else np.where(theirs == NOBODY, mine, theirs)


def _table(rule: Rule, names: str) -> dict[str, Rule]:
    return dict.fromkeys((f"aten::{name}" for name in names.split()), rule)


INDEXING: dict[str, Rule] = {
    **_table(_indexed, "index _unsafe_index"),
    **_table(_index_selected, "index_select"),
    **_table(_gathered, "gather"),
    **_table(_ordered, "sort topk argsort"),
    **_table(_mask_selected, "masked_select"),
    **_table(_nonzero, "nonzero"),
    **_table(_index_put, "index_put _index_put_impl_ _unsafe_index_put"),
    **_table(_index_copied, "index_copy index_add"),
    **_table(_scattered, "scatter scatter_add scatter_reduce"),
    **_table(_mask_scattered, "masked_scatter"),
    **_table(_copied, "copy_"),
}
