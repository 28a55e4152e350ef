"""What ops that move elements make of their owners: the same as of the elements."""

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
    aligned,
    compressed,
    constant,
    full,
    join,
    reshaped,
)
from fastlora.rows.rules import Found, Op, Rule


def _viewed(op: Op) -> Found:
    x, out = op.args[0], op.outs[0]
    o = op.own(x)
    if o is None or isinstance(op.args[1] if len(op.args) > 1 else None, torch.dtype):
        return o if o is None or x.shape == out.shape else constant(MIXED, out.dim())
    return reshaped(o, tuple(x.shape), tuple(out.shape))


def _permuted(op: Op) -> Found:
    o, ndim = op.own(op.args[0]), op.args[0].dim()
    if o is None:
        return None
    dims = list(range(ndim))
    if op.func._schema.name == "aten::permute":
        dims = [d % ndim for d in op.args[1]]
    elif op.func._schema.name in ("aten::t", "aten::t_"):
        dims.reverse()
    elif ndim:
        a, b = op.args[1] % ndim, op.args[2] % ndim
        dims[a], dims[b] = dims[b], dims[a]
    return o.transpose(dims)


def _expanded(op: Op) -> Found:
    o = op.own(op.args[0])
    return None if o is None else aligned(o, op.outs[0].dim())


def _repeated(op: Op) -> Found:
    o = op.own(op.args[0])
    if o is None:
        return None
    o = aligned(o, op.outs[0].dim())
    times = [n if size > 1 else 1 for n, size in zip(op.args[1], o.shape, strict=True)]
    return np.tile(o, times)


def _selected(op: Op) -> Found:
    o = op.own(op.args[0])
    if o is None:
        return None
    dim = op.arg("dim") % o.ndim
    return o.take(0 if o.shape[dim] == 1 else op.arg("index"), dim)


def _sliced(op: Op) -> Found:
    o = op.own(op.args[0])
    if o is None:
        return None
    dim = (op.arg("dim") or 0) % o.ndim
    if o.shape[dim] == 1:
        return o
    part = slice(op.arg("start"), op.arg("end"), op.arg("step") or 1)
    return o[(slice(None),) * dim + (part,)]


def _split(op: Op) -> Found:
    o = op.own(op.args[0])
    if o is None:
        return None
    dim, begin, found = (op.arg("dim") or 0) % o.ndim, 0, []
    for out in op.outs:
        gone = out.dim() < op.args[0].dim()
        end = begin + (1 if gone else out.shape[dim])
        part = o if o.shape[dim] == 1 else o[(slice(None),) * dim + (slice(begin, end),)]
        found.append(part.squeeze(dim) if gone else part)
        begin = end
    return found


def _concatenated(op: Op) -> Found:
    out = op.outs[0]
    parts = [t for t in op.args[0] if t.dim() == out.dim()]
    return _one_after_another(op, parts, (op.arg("dim") or 0) % out.dim(), list(map(op.own, parts)))


def _stacked(op: Op) -> Found:
    dim = (op.arg("dim") or 0) % op.outs[0].dim()
    owners = [None if o is None else np.expand_dims(o, dim) for o in map(op.own, op.args[0])]
    return _one_after_another(op, [t.unsqueeze(dim) for t in op.args[0]], dim, owners)


def _one_after_another(
    op: Op, parts: Sequence[Tensor], dim: int, owners: Sequence[Owners | None]
) -> Found:
    given = [o for o in owners if o is not None]
    if all(o.shape[dim] == 1 for o in given):
        # What is nobody's beside it along another dimension than that of the rows is theirs.
        found = join(*given)
        if found is None or not (found == MIXED).any():
            return found
    sizes = [max(o.shape[d] for o in given) for d in range(parts[0].dim())]
    whole = []
    for t, o in zip(parts, owners, strict=True):
        sizes[dim] = t.shape[dim]
        whole.append(np.broadcast_to(constant(NOBODY, t.dim()) if o is None else o, sizes))
    return compressed(np.concatenate(whole, dim))


def _padded(op: Op) -> Found:
    o, pad = op.own(op.args[0]), list(op.args[1])
    if o is None:
        return None
    for i in range(len(pad) // 2):
        dim, (before, after) = o.ndim - 1 - i, pad[2 * i : 2 * i + 2]
        if o.shape[dim] > 1:
            size = o.shape[dim]
            o = o[(slice(None),) * dim + (slice(max(0, -before), size - max(0, -after)),)]
            width = [(0, 0)] * o.ndim
            width[dim] = (max(0, before), max(0, after))
            o = np.pad(o, width, constant_values=NOBODY)
    return o


def _rolled(op: Op) -> Found:
    o = op.own(op.args[0])
    if o is None or not op.arg("dims"):
        return o if o is None or o.size == 1 else constant(MIXED, o.ndim)
    if op.func._schema.name == "aten::flip":
        return np.flip(o, op.arg("dims"))
    return np.roll(o, op.arg("shifts"), op.arg("dims"))


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
        values = (slice(None) if t is None else op.values(t) for t in self.given)
        return tuple(v.astype(bool) if getattr(v, "dtype", None) == np.uint8 else v for v in values)

    def owners(self, op: Op) -> Owners | None:
        """Of what is taken from nobody's: those of who asks."""
        return join(*(
            None if o is None else constant(MIXED, 1) if t.dtype == torch.bool and t.dim() > 1 else o
            for t, o in ((t, op.own(t)) for t in self.given if t is not None)
        ))  # fmt: skip


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
        # Who comes to one place twice: first and last must be the same.
        twice, flat = after.copy(), np.arange(after.size).reshape(after.shape)[places]
        values_of = np.broadcast_to(theirs, flat.shape)
        twice.reshape(-1)[flat.reshape(-1)[::-1]] = values_of.reshape(-1)[::-1]
        after = np.where(after == twice, after, np.int32(MIXED))
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


MOVING: dict[str, Rule] = {
    **_table(
        _viewed, "view _unsafe_view _reshape_alias reshape squeeze unsqueeze flatten unflatten"
    ),
    **_table(_permuted, "permute transpose t"),
    **_table(_expanded, "expand"),
    **_table(_repeated, "repeat"),
    **_table(_selected, "select"),
    **_table(_sliced, "slice"),
    **_table(_split, "split split_with_sizes unsafe_split unsafe_split_with_sizes unbind"),
    **_table(_concatenated, "cat"),
    **_table(_stacked, "stack"),
    **_table(_padded, "constant_pad_nd"),
    **_table(_rolled, "roll flip"),
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
