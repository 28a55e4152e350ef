"""The backend ``"triton"``: the ops of one adapter, composed of the kernels beside this file.

Operands as ``fastlora/backends/torch/linear.py`` has them: matrices of any strides and alignment,
float16, bfloat16 or float32 (as torch's tf32 setting says), adapters of the same dtype or float32,
R up to 512. Forward is one ``Product``; backward is another, for x, whose h is ``g = dy @ lora_B``,
and two ``gradient`` sums, lora_A's of g and x, lora_B's of what forward kept and dy. h is kept
because it costs R / K of x's bytes, and computing it again would read all of x. The gradients of
weight and biases, which LoRA freezes, are the library's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastlora.backends.in_place import mark_written
from fastlora.backends.triton.product import Product, run
from fastlora.kernels.choose.choice import config_of
from fastlora.kernels.choose.ledger import Problem
from fastlora.kernels.linear.gradient import gradient
from fastlora.kernels.linear.shrink import shrink
from fastlora.kernels.tile.launch import Dropout, by_columns, rows_of_ones


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    lora_bias: Tensor | None,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    path: str | None = None,
    invariant: bool = False,
) -> tuple[Tensor, Tensor]:
    M, N, R = x.shape[0], weight.shape[0], lora_A.shape[0]
    y, h = x.new_empty(M, N), x.new_empty(M, R)
    operands = (x, weight.T, lora_A, lora_B.T, y, h, scaling, _dense(bias), _dense(lora_bias))
    run(Product(*operands, Dropout.of(dropout_p, seed), invariant=invariant), "lora_linear", path)
    return y, h


def lora_add_(
    y: Tensor,
    h: Tensor,
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    lora_bias: Tensor | None,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    path: str | None = None,
    invariant: bool = False,
) -> None:
    h_out = h if rows_of_ones(h) else h.new_empty(h.shape)
    if torch._C._is_alias_of(y, x):
        # One launch would write tiles of y that it has yet to read as x; two read all of x first.
        path = "two_pass"
    operands = (x, None, lora_A, lora_B.T, y, h_out, scaling, None, _dense(lora_bias))
    run(Product(*operands, Dropout.of(dropout_p, seed), invariant=invariant), "lora_add_", path)
    mark_written(y, h_out)
    if h_out is not h:
        h.copy_(h_out)


def lora_linear_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    h: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    needs: Sequence[bool],
    path: str | None = None,
) -> list[Tensor]:
    """Gradients of (x, weight, bias, lora_A, lora_B, lora_bias): those that ``needs`` asks for."""
    need_x, need_weight, need_bias, need_A, need_B, need_lora_bias = needs
    drop = Dropout.of(dropout_p, seed)
    grads: list[Tensor] = []
    g = x.new_empty(x.shape[0], lora_A.shape[0])
    if need_x:
        dx = x.new_empty(x.shape) if weight is not None else x.new_zeros(x.shape)
        inward = Product(dy, weight, lora_B.T, lora_A, dx, g, scaling, drop=drop, drops_x=False)
        run(inward, "lora_linear_backward", path)
        grads.append(dx)
    elif need_A:
        (M, K), (N, R) = x.shape, lora_B.shape
        sizes = {"size": x.itemsize, "lora_size": lora_B.itemsize}
        shape = Problem(M, N, K, R, weight=False, **sizes)
        shrink(dy, lora_B.T, g, config_of("shrink", shape, x.dtype, x.device))
    if need_weight:
        grads.append(by_columns(dy.T) @ x)
    if need_bias:
        grads.append(dy.sum(0))
    if need_A:
        grads.append(_adapter(x, g, lora_A.new_empty(lora_A.shape), scaling, drop))
    if need_B:
        dB = lora_B.new_empty(lora_B.shape)
        _adapter(dy, h if rows_of_ones(h) else h.contiguous(), dB.T, scaling, None)
        grads.append(dB)
    if need_lora_bias:
        grads.append(dy.sum(0, dtype=torch.float32).mul_(scaling).to(lora_B.dtype))
    return grads


def _adapter(x: Tensor, h: Tensor, out: Tensor, scaling: float, drop: Dropout | None) -> Tensor:
    (M, C), R = x.shape, h.shape[1]
    problem = Problem(M, M, C, R, x.itemsize, False, masked="x" if drop else "")
    config = config_of("gradient", problem, x.dtype, x.device)
    gradient(x, h, out, scaling, config, drop=drop)
    return out


def _dense(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.contiguous()
