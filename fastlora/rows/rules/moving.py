"""Rules of ops that move elements: the owners move with them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fastlora.rows.owners import (
    MIXED,
    NOBODY,
    Owners,
    align,
    compress,
    fill_owner,
    join,
    reshape,
)
from fastlora.rows.rules.op import Op, OpOwners, Rule, assign


def _view(op: Op) -> OpOwners:
    x, out = op.args[0], op.outs[0]
    o = op.owners_of(x)
    if o is None or isinstance(op.args[1] if len(op.args) > 1 else None, torch.dtype):
        return o if o is None or x.shape == out.shape else fill_owner(MIXED, out.dim())
    return reshape(o, tuple(x.shape), tuple(out.shape))


def _permute(op: Op) -> OpOwners:
    o, ndim = op.owners_of(op.args[0]), op.args[0].dim()
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


def _expand(op: Op) -> OpOwners:
    o = op.owners_of(op.args[0])
    return None if o is None else align(o, op.outs[0].dim())


def _repeat(op: Op) -> OpOwners:
    o = op.owners_of(op.args[0])
    if o is None:
        return None
    o = align(o, op.outs[0].dim())
    times = [n if size > 1 else 1 for n, size in zip(op.args[1], o.shape, strict=True)]
    return np.tile(o, times)


def _select(op: Op) -> OpOwners:
    o = op.owners_of(op.args[0])
    if o is None:
        return None
    dim = op.arg("dim") % o.ndim
    index = 0 if o.shape[dim] == 1 else op.arg("index")
    return o[(slice(None),) * dim + (index,)]


def _slice(op: Op) -> OpOwners:
    o = op.owners_of(op.args[0])
    if o is None:
        return None
    dim = (op.arg("dim") or 0) % o.ndim
    if o.shape[dim] == 1:
        return o
    part = slice(op.arg("start"), op.arg("end"), op.arg("step") or 1)
    return o[(slice(None),) * dim + (part,)]


def _split(op: Op) -> OpOwners:
    o = op.owners_of(op.args[0])
    if o is None:
        return None
    dim, begin, parts = (op.arg("dim") or 0) % o.ndim, 0, []
    for out in op.outs:
        gone = out.dim() < op.args[0].dim()
        end = begin + (1 if gone else out.shape[dim])
        part = o if o.shape[dim] == 1 else o[(slice(None),) * dim + (slice(begin, end),)]
        parts.append(part.squeeze(dim) if gone else part)
        begin = end
    return parts


def _concatenate(op: Op) -> OpOwners:
    out = op.outs[0]
    parts = [t for t in op.args[0] if t.dim() == out.dim()]
    return _concatenate_owners(
        op, parts, (op.arg("dim") or 0) % out.dim(), list(map(op.owners_of, parts))
    )


def _stack(op: Op) -> OpOwners:
    dim = (op.arg("dim") or 0) % op.outs[0].dim()
    owners = [None if o is None else np.expand_dims(o, dim) for o in map(op.owners_of, op.args[0])]
    return _concatenate_owners(op, [t.unsqueeze(dim) for t in op.args[0]], dim, owners)


def _concatenate_owners(
    op: Op, parts: Sequence[Tensor], dim: int, owners: Sequence[Owners | None]
) -> OpOwners:
    known = [o for o in owners if o is not None]
    # Beside one row's, one after another, what is nobody's may be another row.
    unclear = dim == 0 and len(known) < len(owners) and any(o.size == 1 for o in known)
    if all(o.shape[dim] == 1 for o in known) and not unclear:
        # What is nobody's beside it along another dimension than that of the rows is theirs.
        joined = join(*known)
        if joined is None or not (joined == MIXED).any():
            return joined
    sizes = [max(o.shape[d] for o in known) for d in range(parts[0].dim())]
    whole = []
    for t, o in zip(parts, owners, strict=True):
        sizes[dim] = t.shape[dim]
        whole.append(np.broadcast_to(fill_owner(NOBODY, t.dim()) if o is None else o, sizes))
    return compress(np.concatenate(whole, dim))


def _pad(op: Op) -> OpOwners:
    o, pad = op.owners_of(op.args[0]), list(op.args[1])
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


def _roll(op: Op) -> OpOwners:
    o = op.owners_of(op.args[0])
    if o is None or not op.arg("dims"):
        return o if o is None or o.size == 1 else fill_owner(MIXED, o.ndim)
    if op.func._schema.name == "aten::flip":
        return np.flip(o, op.arg("dims"))
    return np.roll(o, op.arg("shifts"), op.arg("dims"))


MOVING: dict[str, Rule] = {
    **assign(_view, "view _unsafe_view _reshape_alias reshape squeeze unsqueeze flatten unflatten"),
    **assign(_permute, "permute transpose t"),
    **assign(_expand, "expand"),
    **assign(_repeat, "repeat"),
    **assign(_select, "select"),
    **assign(_slice, "slice"),
    **assign(_split, "split split_with_sizes unsafe_split unsafe_split_with_sizes unbind"),
    **assign(_concatenate, "cat"),
    **assign(_stack, "stack"),
    **assign(_pad, "constant_pad_nd"),
    **assign(_roll, "roll flip"),
}
