"""One adapter in plain torch.

All operands are matrices of any strides: x (M, K), weight (N, K), lora_A (R, K), lora_B (N, R),
h = dropout(x) @ lora_A.T (M, R), which forward leaves for backward. Many adapters: A (S, R, K) and
B (S, N, R).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastlora.backends import dropout
from fastlora.backends.torch import products as library
from fastlora.backends.torch.wide_products import (
    accumulator,
    adapter_gradient,
    alone,
    base_gradient,
    linear,
    row_blocks,
)


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
    invariant: bool = False,
) -> tuple[Tensor, Tensor]:
    y = linear(x, weight, bias, invariant)
    h = x.new_empty(x.shape[0], lora_A.shape[0])
    lora_add_(y, h, x, lora_A, lora_B, lora_bias, scaling, dropout_p, seed, invariant)
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
    invariant: bool = False,
) -> None:
    A, B = lora_A.to(x.dtype), lora_B.to(x.dtype)
    if invariant:
        for row in range(x.shape[0]):
            x_row = alone(x, row)
            if seed is not None:
                x_row = dropout.dropped(x_row, dropout_p, seed, row)
            h[row] = (x_row @ A.T)[0]
        for row in range(x.shape[0]):
            y_row = alone(y, row).addmm_(alone(h, row), B.T, alpha=scaling)
            y[row] = (y_row if lora_bias is None else y_row.add_(lora_bias, alpha=scaling))[0]
        return
    if seed is None:
        library.mm(x, A.T, out=h)
    else:
        for rows in row_blocks(x):
            seen = dropout.dropped(x[rows], dropout_p, seed, rows.start)
            library.mm(seen, A.T, out=h[rows])
    library.addmm_(y, h, B.T, scaling)
    if lora_bias is not None:
        y.add_(lora_bias, alpha=scaling)


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
) -> list[Tensor]:
    """Gradients of (x, weight, bias, lora_A, lora_B, lora_bias): those that ``needs`` asks for."""
    need_x, need_weight, need_bias, need_A, need_B, need_lora_bias = needs
    dx = base_gradient(dy, x, weight) if need_x else None
    dA = None
    if need_x or need_A:
        # Scaled only within the products that g enters: it may overflow a half-precision dtype.
        g = library.mm(dy, lora_B.to(dy.dtype))  # [M, R]
        if seed is not None:
            dA = _through_dropout(dx, g, x, lora_A, need_A, scaling, dropout_p, seed)
        else:
            if dx is not None:
                library.addmm_(dx, g, lora_A.to(x.dtype), scaling)
            dA = adapter_gradient(g, x, lora_A.dtype, scaling) if need_A else None
    wide = torch.promote_types(dy.dtype, torch.float32)
    grads = [
        dx,
        library.mm(dy.T, x) if need_weight else None,
        dy.sum(0) if need_bias else None,
        dA,
        adapter_gradient(dy, h, lora_B.dtype, scaling) if need_B else None,
        dy.sum(0, dtype=wide).mul_(scaling).to(lora_B.dtype) if need_lora_bias else None,
    ]
    return [grad for grad in grads if grad is not None]


def _through_dropout(
    dx: Tensor | None,
    g: Tensor,
    x: Tensor,
    lora_A: Tensor,
    need_A: bool,
    scaling: float,
    dropout_p: float,
    seed: Tensor,
) -> Tensor | None:
    """Adds ``mask * (g @ lora_A)`` to dx and returns ``g.T @ (mask * x)``, one mask for both."""
    A, scale = lora_A.to(x.dtype), scaling * dropout.keep_scale(dropout_p)
    wide = accumulator(lora_A.dtype, x.dtype)
    total = lora_A.new_zeros(lora_A.shape, dtype=wide) if need_A else None
    for rows in row_blocks(x):
        x_rows, g_rows = x[rows], g[rows]
        keep = dropout.keep_mask(x_rows.shape[0], x.shape[1], dropout_p, seed, rows.start)
        if dx is not None:
            dx[rows] += library.mm(g_rows, A).mul_(keep).mul_(scale)
        if total is not None:
            total.addmm_(g_rows.T.to(wide), x_rows.mul(keep).to(wide), alpha=scale)
    return None if total is None else total.to(lora_A.dtype)
