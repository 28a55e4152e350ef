"""The backend ``"triton"``: the ops of many adapters, composed of the kernels beside this file.

Operands as ``fastlora/backends/torch/multi.py`` has them; what ``linear.py`` says of dtypes,
strides and ranks holds here. Forward and the gradient for x are a ``MultiProduct`` each, in which A
and B change places; the adapters' gradients are sums over each one's rows. Ids, ranks, scales and
pages stay on the device: no call waits for it, and a captured graph follows what is written to
them.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastlora.backends.in_place import mark_written
from fastlora.backends.triton.multi_product import MultiProduct, run
from fastlora.backends.values import Adapters, Rows
from fastlora.kernels.choose.choice import config_of
from fastlora.kernels.choose.ledger import Problem
from fastlora.kernels.multi.batch import KernelAdapters, KernelRows
from fastlora.kernels.multi.gradient import multi_gradient
from fastlora.kernels.multi.shrink import multi_shrink
from fastlora.kernels.tile.launch import by_columns, rows_of_ones


def multi_lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    adapters: Adapters,
    rows: Rows,
    invariant: bool = False,
    path: str | None = None,
) -> tuple[Tensor, Tensor]:
    adapters = adapters._replace(ends=(weight.shape[0],))
    return _linear("multi_lora_linear", x, weight, bias, adapters, rows, invariant, path)


def multi_lora_add_(
    y: Tensor,
    h: Tensor,
    x: Tensor,
    adapters: Adapters,
    rows: Rows,
    invariant: bool = False,
    path: str | None = None,
) -> None:
    to_h = h if rows_of_ones(h) else h.new_empty(h.shape)
    adapters = adapters._replace(ends=(y.shape[1],))
    _add("multi_lora_add_", y, to_h, x, adapters, rows, path)
    mark_written(y, to_h)
    if to_h is not h:
        h.copy_(to_h)


def multi_lora_linear_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    adapters: Adapters,
    h: Tensor,
    rows: Rows,
    needs: Sequence[bool],
    path: str | None = None,
) -> list[Tensor]:
    """Gradients of (x, weight, bias, lora_A, lora_B): those that ``needs`` asks for."""
    need_x, need_weight, need_bias, need_A, need_B = needs
    lora_A, lora_B = adapters.lora_A, adapters.lora_B
    kernel_rows, turned = _rows(rows), _adapters(adapters).turned
    grads: list[Tensor] = []
    g = x.new_empty(x.shape[0], lora_A.shape[1])
    if need_x:
        dx = x.new_empty(x.shape) if weight is not None else x.new_zeros(x.shape)
        inward = MultiProduct(dy, weight, turned, kernel_rows, dx, g, (x.shape[1],))
        run(inward, "multi_lora_linear_backward", path)
        grads.append(dx)
    elif need_A:
        shape = Problem(*dy.shape, x.shape[1], turned.R, dy.itemsize, lora_size=lora_A.itemsize)
        config = config_of("multi_shrink", shape, dy.dtype, dy.device)
        multi_shrink(dy, turned, kernel_rows, g, config)
    if need_weight:
        grads.append(by_columns(dy.T) @ x)
    if need_bias:
        grads.append(dy.sum(0))
    starts = rows.starts.contiguous()
    if need_A:
        dA = lora_A.new_empty(lora_A.shape)
        grads.append(dA)
        _fill_gradient(dA, x, g, kernel_rows, starts)
    if need_B:
        dB = lora_B.new_empty(lora_B.shape)
        grads.append(dB)
        h = h if rows_of_ones(h) else h.contiguous()
        _fill_gradient(dB.transpose(1, 2), dy, h, kernel_rows, starts)
    return grads


def packed_lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    adapters: Adapters,
    rows: Rows,
    invariant: bool = False,
    path: str | None = None,
) -> Tensor:
    """y alone; see ``fastlora/backends/packed.py`` for how slices and pages lie."""
    return _linear("packed_lora_linear", x, weight, bias, adapters, rows, invariant, path)[0]


def packed_lora_add_(
    y: Tensor,
    x: Tensor,
    adapters: Adapters,
    rows: Rows,
    invariant: bool = False,
    path: str | None = None,
) -> None:
    h = x.new_empty(x.shape[0], len(adapters.ends) * adapters.count_ranks())
    _add("packed_lora_add_", y, h, x, adapters, rows, path)
    mark_written(y)


def _linear(
    op: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    adapters: Adapters,
    rows: Rows,
    invariant: bool,
    path: str | None,
) -> tuple[Tensor, Tensor]:
    """y (T, N) and h (T, C * R)."""
    T, ends = x.shape[0], tuple(adapters.ends)
    y, h = x.new_empty(T, weight.shape[0]), x.new_empty(T, len(ends) * adapters.count_ranks())
    bias = None if bias is None else bias.contiguous()
    operands = x, weight.T, _adapters(adapters), _rows(rows)
    run(MultiProduct(*operands, y, h, ends, bias, invariant), op, path)
    return y, h


def _add(
    op: str, y: Tensor, h: Tensor, x: Tensor, adapters: Adapters, rows: Rows, path: str | None
) -> None:
    operands = x, None, _adapters(adapters), _rows(rows)
    run(MultiProduct(*operands, y, h, tuple(adapters.ends)), op, path)


def _fill_gradient(out: Tensor, x: Tensor, h: Tensor, rows: KernelRows, starts: Tensor) -> None:
    """Fills out (S, R, C) with each adapter's sum over its rows of h (T, R) times x (T, C)."""
    shape = Problem(x.shape[0], x.shape[0], x.shape[1], h.shape[1], x.itemsize, False)
    config = config_of("multi_gradient", shape, x.dtype, x.device)
    multi_gradient(x, h, out, rows, starts, config)


def _rows(rows: Rows) -> KernelRows:
    return KernelRows.of(rows.ids, rows.order, rows.scalings, rows.ranks, rows.row_scales)


def _adapters(adapters: Adapters) -> KernelAdapters:
    return KernelAdapters.of(adapters.lora_A, adapters.lora_B, adapters.table)
