"""Rules of ops that compute with elements; those that move elements have theirs in moving.py.

A rule takes an ``Op`` that has run and returns the owners of each of its tensors, or one for all.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastlora.rows.owners import MIXED, Owners, align, fill_owner, join, join_along
from fastlora.rows.rules.op import Op, OpOwners, list_tensors


def join_elements(op: Op) -> OpOwners:
    ndim = op.outs[0].dim()
    joined = join(*map(op.owners_of, list_tensors([*op.args, *op.kwargs.values()])))
    return None if joined is None else align(joined, ndim)


def keep_first(op: Op) -> OpOwners:
    """Keeps the first operand's owners: elements stay where they are."""
    return op.owners_of(op.args[0])


def disown(op: Op) -> OpOwners:
    return None


def _list_dims(op: Op, ndim: int, name: str = "dim") -> list[int]:
    dim = op.arg(name)
    dims = [dim] if isinstance(dim, int) else list(dim or range(ndim))
    return [d % ndim for d in dims] if ndim else []


def reduce(op: Op) -> OpOwners:
    x, owners = op.args[0], []
    dims = _list_dims(op, x.dim())
    for out in op.outs:
        o = join_along(op.owners_of(x), dims if out.dim() or x.dim() < 1 else range(x.dim()))
        if o is not None and out.dim() < x.dim():
            o = o.squeeze(tuple(dims) if out.dim() else None)
        # A single number is no row, whoever has gone into it.
        if o is not None and not out.dim() and int(o) == MIXED:
            o = None
        owners.append(o)
    return owners


def join_dim(op: Op) -> OpOwners:
    """Joins over one dimension, which stays: softmax, cumsum, sort."""
    x = op.args[0]
    dim = op.arg("dim")
    return join_along(op.owners_of(x), [-1 if dim is None else dim]) if x.dim() else op.owners_of(x)


def transform(op: Op) -> OpOwners:
    return join_along(op.owners_of(op.args[0]), op.args[1])


def normalise(op: Op) -> OpOwners:
    """Joins over the last dimensions."""
    x = op.args[0]
    return join_along(op.owners_of(x), range(x.dim() - len(op.args[1]), x.dim()))


def normalise_groups(op: Op) -> OpOwners:
    o = join_along(op.owners_of(op.args[0]), range(1, op.args[0].dim()))
    return [o, *(None if o is None else o.reshape(-1, 1) for _ in op.outs[1:])]


def normalise_batch(op: Op) -> OpOwners:
    """Keeps owners: a statistic of all rows gives none of them to another."""
    return [op.owners_of(op.args[0]), *(None for _ in op.outs[1:])]


def convolve(op: Op) -> OpOwners:
    """Joins over all but the first dimension: convolutions, pools, resizing."""
    inputs = [join_along(op.owners_of(t), range(1, t.dim())) for t in list_tensors(op.args[:1])]
    weights = [op.owners_of(t) for t in list_tensors(op.args[1:])]
    o = join(*inputs, *(join_all(each) for each in weights))
    return [None if o is None else _spread_rows(o, out) for out in op.outs]


def join_all(o: Owners | None) -> Owners | None:
    """Joins all of a tensor's owners into one."""
    return None if o is None else join_along(o, range(o.ndim)).reshape(())  # pyright: ignore


def _spread_rows(o: Owners, out: Tensor) -> Owners:
    size = o.shape[0] if o.ndim else 1
    return o.reshape(size, *[1] * (out.dim() - 1)) if out.dim() else fill_owner(MIXED, 0)


def join_product(a: Owners | None, b: Owners | None) -> Owners | None:
    return join(join_along(a, [-1]), join_along(b, [-2]))


def multiply(op: Op) -> OpOwners:
    *added, a, b = (t for t in op.args if isinstance(t, Tensor))
    joined = join_product(op.owners_of(a), op.owners_of(b))
    for t in added:
        joined = join(joined, op.owners_of(t))
    return None if joined is None else align(joined, op.outs[0].dim())


def multiply_linear(op: Op) -> OpOwners:
    x, weight = op.args[0], op.owners_of(op.args[1])
    bias = op.arg("bias") if "bias" in str(op.func._schema) else None
    return join(join_along(op.owners_of(x), [-1]), join_all(weight), join_all(op.owners_of(bias)))


def multiply_vector(op: Op) -> OpOwners:
    a, v = join_along(op.owners_of(op.args[0]), [-1]), join_along(op.owners_of(op.args[1]), [0])
    return join(None if a is None else a.reshape(-1), v)


def multiply_rows(op: Op) -> OpOwners:
    """Joins along a row: its matrix is nobody's."""
    return join_along(op.owners_of(op.args[0]), [-1])


def attend(op: Op) -> OpOwners:
    q, k, v = (op.owners_of(t) for t in op.args[:3])
    heads = op.args[0].shape[1] if op.args[0].dim() == 4 else None

    def join_heads(t: Tensor, o: Owners | None) -> Owners | None:
        o = join_along(o, [-1, -2])
        return join_along(o, [1]) if o is not None and heads not in (None, t.shape[1]) else o

    joined = join(join_along(q, [-1]), join_heads(op.args[1], k), join_heads(op.args[2], v))
    mask = op.arg("attn_mask") if op.arg("attn_mask") is not None else op.arg("attn_bias")
    joined = join(joined, join_along(op.owners_of(mask), [-1]))
    rows = op.args[0].shape[:-1]
    return [_fit_result(joined, rows, out) for out in op.outs]


def _fit_result(o: Owners | None, rows: Sequence[int], out: Tensor) -> Owners | None:
    """Fits owners to an attention's result, or to its sums (B, H, L); seeds are nobody's."""
    if o is None or out.shape[: len(rows)] != tuple(rows):
        return None
    return o if out.dim() == len(rows) + 1 else o.reshape(o.shape[:-1])


def recur(op: Op) -> OpOwners:
    """Joins over time, the first dimension of three, and over features."""
    o = join_along(op.owners_of(op.args[0]), [0, 2])
    return [
        o if out.dim() == 3 and out.shape[1] == op.args[0].shape[1] else None for out in op.outs
    ]


def run_fastlora(op: Op) -> OpOwners:
    """Follows our own ops, which keep rows: the first result, or what is written, has x's."""
    x = join_along(op.owners_of(op.arg("x")), [-1])
    return [join(x, op.owners_of(op.arg("y"))), *(x for _ in op.outs[1:])]


def run_bitsandbytes(op: Op) -> OpOwners:
    """Follows quantized products, and what prepares their left operand, row by row.

    All rows decide together which columns are outliers; that gives no row to another.
    """
    A = op.args[0]
    lead, owners = A.shape[:-1], []
    o = join_along(op.owners_of(A), [-1])
    for out in op.outs:
        if o is None or out.shape[: len(lead)] != lead:
            owners.append(None)
        else:
            owners.append(o if out.dim() == A.dim() else o.reshape(o.shape[:-1]))
    return owners


def pair_complex(op: Op) -> OpOwners:
    """Adds a dimension (view_as_real) or takes one away (view_as_complex)."""
    o, more = op.owners_of(op.args[0]), op.outs[0].dim() > op.args[0].dim()
    return None if o is None else o[..., None] if more else join_along(o, [-1])[..., 0]  # pyright: ignore


def sample(op: Op) -> OpOwners:
    return join_along(op.owners_of(op.args[0]), [-1])


def look_up(op: Op) -> OpOwners:
    """Joins the weight's and the indices' owners: embedding(weight, indices)."""
    weight, indices = join_all(op.owners_of(op.args[0])), op.owners_of(op.args[1])
    return join(weight, None if indices is None else indices[..., None])


def mix_all(op: Op) -> OpOwners:
    return [fill_owner(MIXED, out.dim()) for out in op.outs]


def keep_first_in_all(op: Op) -> OpOwners:
    return [op.owners_of(op.args[0]) for _ in op.outs]


def run_cell(op: Op) -> OpOwners:
    """Joins over features: recurrent cells have (B, ...) in, (B, ...) out."""
    o = join(
        *(
            join_along(op.owners_of(t), range(1, t.dim()))
            for t in list_tensors(op.args)
            if t.dim() > 1
        )
    )
    return [None if o is None else _spread_rows(o, out) for out in op.outs]
