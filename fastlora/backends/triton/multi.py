"""The backend ``"triton"``: the ops of many adapters, composed of the kernels beside this file.

Operands as ``fastlora/backends/torch/multi.py`` has them; what ``lora.py`` says of dtypes, strides
and ranks holds here. Forward and the gradient for x are a ``MultiProduct`` each, in which A and B
change places; the adapters' gradients are sums over each one's rows. Ids, ranks, scales and pages
stay on the device: no call waits for it, and a captured graph follows what is written to them.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastlora.backends.triton.multi_product import MultiProduct, run
from fastlora.kernels.choose.choice import config_of
from fastlora.kernels.choose.ledger import Problem
from fastlora.kernels.multi.batch import Adapters, Rows
from fastlora.kernels.multi.gradient import multi_gradient
from fastlora.kernels.multi.shrink import multi_shrink
from fastlora.kernels.tile.launch import by_columns, rows_of_ones, written


def multi_lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    ids: Tensor,
    order: Tensor,
    starts: Tensor,
    scalings: Tensor,
    ranks: Tensor | None,
    row_scales: Tensor | None,
    path: str | None = None,
    invariant: bool = False,
) -> tuple[Tensor, Tensor]:
    (T, N), R = (x.shape[0], weight.shape[0]), lora_A.shape[1]
    y, h = x.new_empty(T, N), x.new_empty(T, R)
    rows = Rows.of(ids, order, scalings, ranks, row_scales)
    bias = None if bias is None else bias.contiguous()
    adapters = Adapters.of(lora_A, lora_B)
    product = MultiProduct(x, weight.T, adapters, rows, y, h, (N,), bias, invariant)
    run(product, "multi_lora_linear", path)
    return y, h


def multi_lora_add_(
    y: Tensor,
    h: Tensor,
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    ids: Tensor,
    order: Tensor,
    starts: Tensor,
    scalings: Tensor,
    ranks: Tensor | None,
    row_scales: Tensor | None,
    path: str | None = None,
    invariant: bool = False,
) -> None:
    own = h if rows_of_ones(h) else h.new_empty(h.shape)
    rows = Rows.of(ids, order, scalings, ranks, row_scales)
    adapters = Adapters.of(lora_A, lora_B)
    run(MultiProduct(x, None, adapters, rows, y, own, (y.shape[1],)), "multi_lora_add_", path)
    written(y, own)
    if own is not h:
        h.copy_(own)


def multi_lora_linear_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    h: Tensor,
    ids: Tensor,
    order: Tensor,
    starts: Tensor,
    scalings: Tensor,
    ranks: Tensor | None,
    row_scales: Tensor | None,
    needs: Sequence[bool],
    path: str | None = None,
) -> list[Tensor]:
    """Gradients of (x, weight, bias, lora_A, lora_B): those that ``needs`` asks for."""
    need_x, need_weight, need_bias, need_A, need_B = needs
    rows = Rows.of(ids, order, scalings, ranks, row_scales)
    turned = Adapters.of(lora_A, lora_B).turned
    grads: list[Tensor] = []
    g = x.new_empty(x.shape[0], lora_A.shape[1])
    if need_x:
        dx = x.new_empty(x.shape) if weight is not None else x.new_zeros(x.shape)
        inward = MultiProduct(dy, weight, turned, rows, dx, g, (x.shape[1],))
        run(inward, "multi_lora_linear_backward", path)
        grads.append(dx)
    elif need_A:
        shape = Problem(*dy.shape, x.shape[1], turned.R, dy.itemsize, lora_size=lora_A.itemsize)
        multi_shrink(dy, turned, rows, g, config_of("multi_shrink", shape, dy.dtype, dy.device))
    if need_weight:
        grads.append(by_columns(dy.T) @ x)
    if need_bias:
        grads.append(dy.sum(0))
    starts = starts.contiguous()
    if need_A:
        dA = lora_A.new_empty(lora_A.shape)
        grads.append(dA)
        _adapters(x, g, dA, rows, starts)
    if need_B:
        dB = lora_B.new_empty(lora_B.shape)
        grads.append(dB)
        own = h if rows_of_ones(h) else h.contiguous()
        _adapters(dy, own, dB.transpose(1, 2), rows, starts)
    return grads


def packed_lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    table: Tensor | None,
    ends: Sequence[int],
    ids: Tensor,
    order: Tensor,
    starts: Tensor,
    scalings: Tensor,
    ranks: Tensor | None,
    row_scales: Tensor | None,
    path: str | None = None,
    invariant: bool = False,
) -> Tensor:
    """y alone; see ``fastlora/backends/packed.py`` for how slices and pages lie."""
    y = x.new_empty(x.shape[0], weight.shape[0])
    adapters = Adapters.of(lora_A, lora_B, table)
    h = x.new_empty(x.shape[0], len(ends) * adapters.R)
    rows = Rows.of(ids, order, scalings, ranks, row_scales)
    bias = None if bias is None else bias.contiguous()
    product = MultiProduct(x, weight.T, adapters, rows, y, h, tuple(ends), bias, invariant)
    run(product, "packed_lora_linear", path)
    return y


def packed_lora_add_(
    y: Tensor,
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    table: Tensor | None,
    ends: Sequence[int],
    ids: Tensor,
    order: Tensor,
    starts: Tensor,
    scalings: Tensor,
    ranks: Tensor | None,
    row_scales: Tensor | None,
    path: str | None = None,
    invariant: bool = False,
) -> None:
    adapters = Adapters.of(lora_A, lora_B, table)
    h = x.new_empty(x.shape[0], len(ends) * adapters.R)
    rows = Rows.of(ids, order, scalings, ranks, row_scales)
    run(MultiProduct(x, None, adapters, rows, y, h, tuple(ends)), "packed_lora_add_", path)
    written(y)


def _adapters(x: Tensor, h: Tensor, out: Tensor, rows: Rows, starts: Tensor) -> None:
    shape = Problem(x.shape[0], x.shape[0], x.shape[1], h.shape[1], x.itemsize, False)
    config = config_of("multi_gradient", shape, x.dtype, x.device)
    multi_gradient(x, h, out, rows, starts, config)
