"""What ops that move elements make of their owners: the same as of the elements."""

from __future__ import annotations

from collections.abc import Sequence

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
    join,
    reshaped,
)


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
    index = 0 if o.shape[dim] == 1 else op.arg("index")
    return o[(slice(None),) * dim + (index,)]


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
    # Beside one row's, one after another, what is nobody's may be another row.
    apart = dim == 0 and len(given) < len(owners) and any(o.size == 1 for o in given)
    if all(o.shape[dim] == 1 for o in given) and not apart:
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
}
