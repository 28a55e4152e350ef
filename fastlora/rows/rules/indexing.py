"""Rules of indices, masks and scatters: elements moved to where values say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastlora.rows.owners import (
    MIXED,
    NOBODY,
    Owners,
    align,
    compress,
    expand,
    fill_owner,
    join,
)
from fastlora.rows.rules.op import Op, OpOwners, Rule, assign


def _place(o: Owners | None, begin: int, count: int, ndim: int) -> Owners | None:
    """Puts owners of ``count`` dimensions at those from ``begin`` on of ``ndim``."""
    if o is None:
        return None
    o = align(o, count)
    return o.reshape((1,) * begin + o.shape + (1,) * (ndim - begin - count))


class Indices:
    """The indices of ``x[indices]``: dimensions of x they are for, and theirs in the result."""

    def __init__(self, indices: Sequence[Tensor | None]) -> None:
        self.indices, self.dims, at = list(indices), [], 0
        blocks: list[int] = []
        for i, index in enumerate(indices):
            consumed = 1
            if index is not None:
                mask = index.dtype in (torch.bool, torch.uint8)
                consumed = index.dim() if mask else 1
                self.dims += range(at, at + consumed)
                blocks.append(i)
            at += consumed
        together = blocks == list(range(blocks[0], blocks[-1] + 1)) if blocks else True
        self.begin = (self.dims[0] if self.dims else 0) if together else 0
        counts = [
            1 if t.dtype in (torch.bool, torch.uint8) else t.dim() for t in indices if t is not None
        ]
        self.count = max(counts, default=0)

    def numpy(self, op: Op) -> tuple[Any, ...]:
        values: list[Any] = [slice(None) if t is None else op.read_values(t) for t in self.indices]
        return tuple(v.astype(bool) if getattr(v, "dtype", None) == np.uint8 else v for v in values)

    def owners(self, op: Op) -> Owners | None:
        """Joins the owners of the indices, to whom belongs what is taken from nobody's."""
        owners = []
        for t in self.indices:
            o = op.owners_of(t)
            if o is not None and t is not None and t.dtype == torch.bool and t.dim() > 1:
                o = fill_owner(MIXED, 1)
            owners.append(o)
        return join(*owners)


def _take(op: Op, x: Tensor, index: Sequence[Tensor | None]) -> OpOwners:
    o, indices, ndim = op.owners_of(x), Indices(index), op.outs[0].dim()
    if o is None:
        return _place(indices.owners(op), indices.begin, indices.count, ndim)
    if all(o.shape[d] == 1 for d in indices.dims):
        o = o.squeeze(tuple(indices.dims))
        begin = indices.begin
        return o.reshape(o.shape[:begin] + (1,) * indices.count + o.shape[begin:])
    return compress(expand(o, x.shape, indices.dims)[indices.numpy(op)])


def _index(op: Op) -> OpOwners:
    return _take(op, op.args[0], op.args[1])


def _index_select(op: Op) -> OpOwners:
    x, index = op.args[0], op.arg("index")
    dim = op.arg("dim") % max(x.dim(), 1)
    return _take(op, x, [None] * dim + [index.reshape(-1)])


def _gather(op: Op) -> OpOwners:
    x, index = op.args[0], op.arg("index")
    dim, o = op.arg("dim") % max(x.dim(), 1), op.owners_of(x)
    if o is None or not o.ndim:
        return op.owners_of(index) if o is None else o
    sizes = tuple(slice(0, n if s > 1 else 1) for n, s in zip(index.shape, o.shape, strict=True))
    if o.shape[dim] == 1:
        return o[sizes]
    everywhere = np.broadcast_to(o, tuple(x.shape))
    cut = tuple(slice(None) if d == dim else slice(0, n) for d, n in enumerate(index.shape))
    return compress(np.take_along_axis(everywhere[cut], op.read_values(index), dim))


def _sort(op: Op) -> OpOwners:
    """Follows sort and topk: elements have come from where the indices say."""
    o, dim = op.owners_of(op.args[0]), op.arg("dim")
    if o is None or not o.ndim or o.shape[-1 if dim is None else dim] == 1:
        return o
    dim = (-1 if dim is None else dim) % o.ndim
    everywhere = np.broadcast_to(o, tuple(op.args[0].shape))
    return compress(np.take_along_axis(everywhere, op.read_values(op.outs[-1]), dim))


def _mask_select(op: Op) -> OpOwners:
    x, mask = torch.broadcast_tensors(op.args[0], op.arg("mask"))
    o = op.owners_of(op.args[0])
    o = op.owners_of(op.arg("mask")) if o is None else o
    if o is None:
        return None
    return compress(np.broadcast_to(align(o, x.dim()), tuple(x.shape))[op.read_values(mask)])


def _find_nonzero(op: Op) -> OpOwners:
    x, o = op.args[0], op.owners_of(op.args[0])
    if o is None:
        return None
    places = op.read_values(x) != 0
    place_owners = np.broadcast_to(o, tuple(x.shape))[places]
    return compress(place_owners[:, None]) if op.outs[0].dim() == 2 else compress(place_owners)


def _put(
    op: Op, x: Tensor, index: Sequence[Tensor | None], values: Any, accumulates: bool
) -> OpOwners:
    """Follows ``x[index] = values``, or ``+=``."""
    x_owners, value_owners, indices = op.owners_of(x), op.owners_of(values), Indices(index)
    asks = indices.owners(op)
    if value_owners is None and (x_owners is not None or asks is None):
        return x_owners
    count = indices.count + x.dim() - len(indices.dims)
    if value_owners is None:
        value_owners = _place(asks, indices.begin, indices.count, count)
    assert value_owners is not None
    value_owners = align(value_owners, count)
    begin, end = indices.begin, indices.begin + indices.count
    if all(size == 1 for size in value_owners.shape[begin:end]):
        shape = list(value_owners.shape[:begin] + value_owners.shape[end:])
        for dim in sorted(indices.dims):
            shape.insert(dim, 1)
        joined = join(x_owners, value_owners.reshape(shape))
        if joined is not None and not (joined == MIXED).any():
            return joined
    before = fill_owner(NOBODY, x.dim()) if x_owners is None else x_owners
    before = np.broadcast_to(before, tuple(x.shape))
    places = indices.numpy(op)
    after = np.full(x.shape, NOBODY, np.int32)
    after[places] = value_owners
    if accumulates:
        # All owners that come to one place must be the same.
        low = np.full(x.shape, np.iinfo(np.int32).max, np.int32)
        np.minimum.at(low, places, value_owners)
        high = np.full(x.shape, np.iinfo(np.int32).min, np.int32)
        np.maximum.at(high, places, value_owners)
        came = after != NOBODY
        after = np.where(came & (low != high), np.int32(MIXED), after)
        joined = join(before, after)
        assert joined is not None
        return compress(joined)
    return compress(np.where(after == NOBODY, before, after))


def _index_put(op: Op) -> OpOwners:
    return _put(op, op.args[0], op.args[1], op.args[2], bool(op.arg("accumulate")))


def _index_copy(op: Op) -> OpOwners:
    x = op.args[0]
    index: list[Tensor | None] = [*[None] * (op.args[1] % x.dim()), op.arg("index")]
    value = op.arg("source")
    return _put(op, x, index, value, "add" in op.func._schema.name)


def _scatter(op: Op) -> OpOwners:
    x, index, src = op.args[0], op.arg("index"), op.arg("src")
    dim, x_owners, src_owners = op.arg("dim") % max(x.dim(), 1), op.owners_of(x), op.owners_of(src)
    if src_owners is None:
        src_owners = op.owners_of(index) if x_owners is None else None
    if src_owners is None:
        return x_owners
    if src_owners.ndim and src_owners.shape[dim] == 1:
        fits = all(n in (1, size) for n, size in zip(src_owners.shape, x.shape, strict=True))
        joined = join(x_owners, src_owners) if fits else None
        if joined is not None and not (joined == MIXED).any():
            return joined
    name = op.func._schema.name
    if "add" in name or "reduce" in name or op.arg("reduce") is not None:
        return fill_owner(MIXED, x.dim())  # several may come to one place
    moved = np.broadcast_to(
        src_owners, tuple(index.shape) if src_owners.size == 1 else src_owners.shape
    )
    shape = tuple(index.shape)
    moved = np.broadcast_to(moved, tuple(max(a, 1) for a in moved.shape))
    moved = moved if moved.shape == shape else _cut_to(moved, shape)
    before = np.broadcast_to(
        fill_owner(NOBODY, x.dim()) if x_owners is None else x_owners, tuple(x.shape)
    )
    after = np.full(before.shape, NOBODY, np.int32)
    np.put_along_axis(after[_slice_part(shape, dim)], op.read_values(index), moved, dim)
    return compress(np.where(after == NOBODY, before, after))


def _slice_part(shape: tuple[int, ...], dim: int) -> tuple[slice, ...]:
    return tuple(slice(None) if d == dim else slice(0, n) for d, n in enumerate(shape))


def _cut_to(o: Owners, shape: tuple[int, ...]) -> Owners:
    o = o[tuple(slice(0, n) if s > 1 else slice(None) for n, s in zip(shape, o.shape, strict=True))]
    return np.broadcast_to(o, shape)


def _mask_scatter(op: Op) -> OpOwners:
    x, mask, source = op.args[0], op.arg("mask"), op.arg("source")
    x_owners, src_owners = op.owners_of(x), op.owners_of(source)
    if src_owners is None:
        return x_owners
    places = np.broadcast_to(op.read_values(mask), tuple(x.shape))
    before = np.broadcast_to(
        fill_owner(NOBODY, x.dim()) if x_owners is None else x_owners, tuple(x.shape)
    )
    after = before.copy()
    new_owners = np.broadcast_to(src_owners, tuple(source.shape)).reshape(-1)[: int(places.sum())]
    after[places] = np.where(new_owners == NOBODY, before[places], new_owners)
    return compress(after)


def _copy(op: Op) -> OpOwners:
    x_owners, src_owners = op.owners_of(op.args[0]), op.owners_of(op.args[1])
    if src_owners is None:
        return x_owners
    src_owners = align(src_owners, op.args[0].dim())
    # Constants are nobody's, and take no place from its owner.
    return src_owners if x_owners is None else np.where(src_owners == NOBODY, x_owners, src_owners)


INDEXING: dict[str, Rule] = {
    **assign(_index, "index _unsafe_index"),
    **assign(_index_select, "index_select"),
    **assign(_gather, "gather"),
    **assign(_sort, "sort topk argsort"),
    **assign(_mask_select, "masked_select"),
    **assign(_find_nonzero, "nonzero"),
    **assign(_index_put, "index_put _index_put_impl_ _unsafe_index_put"),
    **assign(_index_copy, "index_copy index_add"),
    **assign(_scatter, "scatter scatter_add scatter_reduce"),
    **assign(_mask_scatter, "masked_scatter"),
    **assign(_copy, "copy_"),
}
