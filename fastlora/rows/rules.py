"""What ops that compute make of their operands' owners; what moves elements is in moving.py.

A rule takes an ``Op`` that has run and returns the owners of each of its tensors, or one for all.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastlora.rows.op import Found, Op, tensors_in
from fastlora.rows.owners import MIXED, Owners, aligned, constant, join, over


def pointwise(op: Op) -> Found:
    ndim = op.outs[0].dim()
    found = join(*map(op.own, tensors_in([*op.args, *op.kwargs.values()])))
    return None if found is None else aligned(found, ndim)


def first(op: Op) -> Found:
    """Elements stay where they are."""
    return op.own(op.args[0])


def nobody(op: Op) -> Found:
    return None


def _dims(op: Op, ndim: int, name: str = "dim") -> list[int]:
    dim = op.arg(name)
    given = [dim] if isinstance(dim, int) else list(dim or range(ndim))
    return [d % ndim for d in given] if ndim else []


def reduced(op: Op) -> Found:
    x, found = op.args[0], []
    dims = _dims(op, x.dim())
    for out in op.outs:
        o = over(op.own(x), dims if out.dim() or x.dim() < 1 else range(x.dim()))
        if o is not None and out.dim() < x.dim():
            o = o.squeeze(tuple(dims) if out.dim() else None)
        # A single number is no row, whoever has gone into it.
        if o is not None and not out.dim() and int(o) == MIXED:
            o = None
        found.append(o)
    return found


def along(op: Op) -> Found:
    """Over one dimension, which stays: softmax, cumsum, sort."""
    x = op.args[0]
    dim = op.arg("dim")
    return over(op.own(x), [-1 if dim is None else dim]) if x.dim() else op.own(x)


def transformed(op: Op) -> Found:
    return over(op.own(op.args[0]), op.args[1])


def normalised(op: Op) -> Found:
    """Over the last dimensions."""
    x = op.args[0]
    return over(op.own(x), range(x.dim() - len(op.args[1]), x.dim()))


def group_normalised(op: Op) -> Found:
    o = over(op.own(op.args[0]), range(1, op.args[0].dim()))
    return [o, *(None if o is None else o.reshape(-1, 1) for _ in op.outs[1:])]


def batch_normalised(op: Op) -> Found:
    """A statistic of all rows makes none of them another's."""
    return [op.own(op.args[0]), *(None for _ in op.outs[1:])]


def spatial(op: Op) -> Found:
    """Over all but the first dimension: convolutions, pools, resizing."""
    found = [over(op.own(t), range(1, t.dim())) for t in tensors_in(op.args[:1])]
    others = [op.own(t) for t in tensors_in(op.args[1:])]
    o = join(*found, *(whole(each) for each in others))
    return [None if o is None else _of(o, out) for out in op.outs]


def whole(o: Owners | None) -> Owners | None:
    """The one owner of all, or several."""
    return None if o is None else over(o, range(o.ndim)).reshape(())  # pyright: ignore


def _of(o: Owners, out: Tensor) -> Owners:
    size = o.shape[0] if o.ndim else 1
    return o.reshape(size, *[1] * (out.dim() - 1)) if out.dim() else constant(MIXED, 0)


def product(a: Owners | None, b: Owners | None) -> Owners | None:
    return join(over(a, [-1]), over(b, [-2]))


def multiplied(op: Op) -> Found:
    *added, a, b = (t for t in op.args if isinstance(t, Tensor))
    found = product(op.own(a), op.own(b))
    for t in added:
        found = join(found, op.own(t))
    return None if found is None else aligned(found, op.outs[0].dim())


def linear(op: Op) -> Found:
    x, weight = op.args[0], op.own(op.args[1])
    bias = op.arg("bias") if "bias" in str(op.func._schema) else None
    return join(over(op.own(x), [-1]), whole(weight), whole(op.own(bias)))


def mv(op: Op) -> Found:
    a, v = over(op.own(op.args[0]), [-1]), over(op.own(op.args[1]), [0])
    return join(None if a is None else a.reshape(-1), v)


def grouped(op: Op) -> Found:
    """A row is multiplied by a matrix of its own, which is nobody's."""
    return over(op.own(op.args[0]), [-1])


def attention(op: Op) -> Found:
    q, k, v = (op.own(t) for t in op.args[:3])
    heads = op.args[0].shape[1] if op.args[0].dim() == 4 else None

    def rest(t: Tensor, o: Owners | None) -> Owners | None:
        o = over(o, [-1, -2])
        return over(o, [1]) if o is not None and heads not in (None, t.shape[1]) else o

    found = join(over(q, [-1]), rest(op.args[1], k), rest(op.args[2], v))
    mask = op.arg("attn_mask") if op.arg("attn_mask") is not None else op.arg("attn_bias")
    found = join(found, over(op.own(mask), [-1]))
    rows = op.args[0].shape[:-1]
    return [_fitting(found, rows, out) for out in op.outs]


def _fitting(found: Owners | None, rows: Sequence[int], out: Tensor) -> Owners | None:
    """Of an attention's result, or of its sums (B, H, L); seeds are nobody's."""
    if found is None or out.shape[: len(rows)] != tuple(rows):
        return None
    return found if out.dim() == len(rows) + 1 else found.reshape(found.shape[:-1])


def recurrent(op: Op) -> Found:
    """Over time, the first dimension of three, and over features."""
    o = over(op.own(op.args[0]), [0, 2])
    return [
        o if out.dim() == 3 and out.shape[1] == op.args[0].shape[1] else None for out in op.outs
    ]


def of_fastlora(op: Op) -> Found:
    """Our own ops keep rows: the first result, or what is written, has x's."""
    x = over(op.own(op.arg("x")), [-1])
    return [join(x, op.own(op.arg("y"))), *(x for _ in op.outs[1:])]


def of_bitsandbytes(op: Op) -> Found:
    """Quantized products, and what prepares their left operand: each row by itself.

    Which columns are outliers all rows decide together; nobody's row is another's by that.
    """
    A = op.args[0]
    lead, found = A.shape[:-1], []
    o = over(op.own(A), [-1])
    for out in op.outs:
        if o is None or out.shape[: len(lead)] != lead:
            found.append(None)
        else:
            found.append(o if out.dim() == A.dim() else o.reshape(o.shape[:-1]))
    return found


def complex_pairs(op: Op) -> Found:
    """view_as_real: one dimension more; view_as_complex: one less."""
    o, more = op.own(op.args[0]), op.outs[0].dim() > op.args[0].dim()
    return None if o is None else o[..., None] if more else over(o, [-1])[..., 0]  # pyright: ignore


def sampled(op: Op) -> Found:
    return over(op.own(op.args[0]), [-1])


def looked_up(op: Op) -> Found:
    """embedding(weight, indices)."""
    weight, indices = whole(op.own(op.args[0])), op.own(op.args[1])
    return join(weight, None if indices is None else indices[..., None])


def unknown(op: Op) -> Found:
    return [constant(MIXED, out.dim()) for out in op.outs]


def several(op: Op) -> Found:
    return [None if o is None else o for o in (op.own(op.args[0]) for _ in op.outs)]


def cell(op: Op) -> Found:
    """Of recurrent cells: (B, ...) in, (B, ...) out."""
    o = join(*(over(op.own(t), range(1, t.dim())) for t in tensors_in(op.args) if t.dim() > 1))
    return [None if o is None else _of(o, out) for out in op.outs]
