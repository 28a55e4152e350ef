"""What ops that compute make of their operands' owners; what moves elements is in moving.py.

A rule takes an ``Op`` that has run and returns the owners of each of its tensors, or one for all.
What has no rule leaves its results to several rows at once, which every layer refuses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fastlora.rows.marks import Marks
from fastlora.rows.owners import MIXED, Owners, aligned, constant, join, over

Found = Owners | None | list[Owners | None]
Rule = Callable[["Op"], Found]


class Op:
    """An op that has run: its arguments by name, its results, and whose they are."""

    def __init__(
        self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], marks: Marks
    ) -> None:
        self.func, self.args, self.kwargs, self.marks = func, args, kwargs, marks
        self.out: Any = None
        # Whether a value of the batch decided on somebody's rows: what is found holds this once.
        self.by_value = False

    def arg(self, name: str) -> Any:
        i, default = _parameters(self.func).get(name, (len(self.args), None))
        return self.args[i] if i < len(self.args) else self.kwargs.get(name, default)

    def own(self, value: Any) -> Owners | None:
        return self.marks.get(value) if isinstance(value, Tensor) else None

    def values(self, t: Tensor) -> Any:
        """What a tensor of indices or a mask holds, since rows go by it."""
        self.by_value = True
        return t.detach().cpu().numpy()

    @property
    def outs(self) -> list[Tensor]:
        return tensors_in(self.out)


@cache
def _parameters(func: Any) -> dict[str, tuple[int, Any]]:
    """{name: (position, default)}."""
    return {a.name: (i, a.default_value) for i, a in enumerate(func._schema.arguments)}


def tensors_in(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    found: list[Tensor] = []
    if isinstance(value, (list, tuple)):
        for part in value:
            if isinstance(part, Tensor):
                found.append(part)
            elif isinstance(part, (list, tuple)):
                found += tensors_in(part)
    return found


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
    return join(over(op.own(x), [-1]), whole(weight))


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


def _table(rule: Rule, names: str) -> dict[str, Rule]:
    return dict.fromkeys((f"aten::{name}" for name in names.split()), rule)


COMPUTING: dict[str, Rule] = {
    **_table(
        first,
        "clone detach alias lift lift_fresh lift_fresh_copy _to_copy contiguous dropout bernoulli "
        "zero_ fill_ normal_ uniform_ bernoulli_ random_ exponential_ log_normal_ tril triu tril_ "
        "triu_ _conj _conj_physical resolve_conj resolve_neg detach_ requires_grad_ isin bucketize "
        "pin_memory _pin_memory to_mkldnn celu masked_fill_ nan_to_num_",
    ),
    **_table(several, "native_dropout _fused_dropout"),
    **_table(
        nobody,
        "zeros_like ones_like empty_like full_like rand_like randn_like randint_like new_zeros "
        "new_ones new_empty new_full new_empty_strided _assert_async _assert_scalar sym_size "
        "_assert_tensor_metadata _local_scalar_dense equal is_nonzero is_same_size",
    ),
    **_table(
        reduced,
        "sum mean amax amin max min any all argmax argmin logsumexp var std var_mean std_mean prod "
        "norm linalg_vector_norm median nanmedian aminmax nansum count_nonzero",
    ),
    **_table(
        along,
        "_softmax _log_softmax _safe_softmax softmax log_softmax cumsum cumprod cumsum_ "
        "cummax cummin glu logcumsumexp kthvalue mode _weight_norm renorm",
    ),
    **_table(transformed, "_fft_r2c _fft_c2r _fft_c2c"),
    **_table(normalised, "native_layer_norm _fused_rms_norm layer_norm rms_norm"),
    **_table(group_normalised, "native_group_norm"),
    **_table(
        batch_normalised,
        "native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training "
        "cudnn_batch_norm miopen_batch_norm _batch_norm_with_update batch_norm",
    ),
    **_table(
        spatial,
        "convolution _convolution mkldnn_convolution cudnn_convolution _slow_conv2d_forward "
        "slow_conv3d_forward conv_depthwise3d _conv_depthwise2d thnn_conv2d "
        "convolution_overrideable cudnn_convolution_transpose conv1d conv2d conv3d "
        "conv_transpose1d conv_transpose2d conv_transpose3d avg_pool1d avg_pool2d avg_pool3d "
        "max_pool2d_with_indices max_pool3d_with_indices max_pool1d max_pool2d max_pool3d "
        "mkldnn_max_pool2d adaptive_avg_pool1d _adaptive_avg_pool2d _adaptive_avg_pool3d "
        "adaptive_avg_pool2d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d "
        "upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact2d "
        "upsample_linear1d upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d "
        "_upsample_bilinear2d_aa _upsample_bicubic2d_aa reflection_pad1d reflection_pad2d "
        "replication_pad1d replication_pad2d replication_pad3d im2col col2im pixel_shuffle "
        "pixel_unshuffle channel_shuffle native_channel_shuffle",
    ),
    **_table(multiplied, "mm bmm addmm baddbmm addmm_ baddbmm_ _addmm_activation"),
    **_table(linear, "linear mkldnn_linear _mkl_linear"),
    **_table(mv, "mv"),
    **_table(grouped, "_grouped_mm _scaled_mm _weight_int4pack_mm _weight_int8pack_mm _int_mm"),
    **_table(
        attention,
        "scaled_dot_product_attention _scaled_dot_product_flash_attention_for_cpu "
        "_scaled_dot_product_flash_attention _scaled_dot_product_efficient_attention "
        "_scaled_dot_product_cudnn_attention _scaled_dot_product_attention_math "
        "_scaled_dot_product_fused_attention_overrideable",
    ),
    **_table(recurrent, "mkldnn_rnn_layer _cudnn_rnn miopen_rnn"),
    **_table(cell, "_thnn_fused_lstm_cell _thnn_fused_gru_cell"),
    **_table(sampled, "multinomial"),
    **_table(complex_pairs, "view_as_real view_as_complex"),
    **_table(looked_up, "embedding"),
}
# By their tag; these lack it in some torch.
for _name in (
    "rrelu_with_noise",
    "_prelu_kernel",
    "lerp",
    "where",
    "masked_fill",
    "hardtanh",
    "floor_divide",
    "floor_divide_",
    "remainder",
):
    COMPUTING.setdefault(f"aten::{_name}", pointwise)


def rule_for(func: Any, moving: dict[str, Rule]) -> Rule | None:
    """None for an op that is to be taken apart, if it can be."""
    name = func._schema.name
    if name.startswith("fastlora::"):
        return of_fastlora
    found = COMPUTING.get(name) or moving.get(name)
    if found is None and name.endswith("_"):
        found = COMPUTING.get(name[:-1]) or moving.get(name[:-1])
    if found is None and torch.Tag.pointwise in func.tags:
        found = pointwise
    return found
