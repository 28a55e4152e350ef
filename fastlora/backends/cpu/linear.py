"""One adapter on the native CPU kernels, and what every call of them needs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from fastlora.backends import dropout, native
from fastlora.backends.cpu import choices
from fastlora.backends.in_place import mark_written
from fastlora.backends.torch import linear as reference
from fastlora.backends.torch import products as library
from fastlora.backends.torch.wide_products import base_gradient, row_blocks

_Given = TypeVar("_Given", Tensor, Tensor | None)


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
    args = (lora_A, lora_B, lora_bias, scaling, dropout_p, seed)
    if invariant and not readable(weight):
        return reference.lora_linear(x, weight, bias, *args, invariant=True)
    M, N = x.shape[0], weight.shape[0]
    h = x.new_empty(M, lora_A.shape[0])
    if seed is None and (invariant or (h.numel() and few(M, weight, "lora_linear"))):
        y = x.new_empty(M, N)
        run_linear(y, h, x, weight, bias, lora_A, lora_B, lora_bias, scaling)
        return y, h
    y = product(x, weight, bias, "lora_linear", invariant)
    lora_add_(y, h, x, *args)
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
    to_y, to_h = writable(y), writable(h)
    factors = (None, None, lora_A, lora_B, lora_bias, scaling)
    if seed is None:
        run_linear(to_y, to_h, x, *factors)
    else:
        drop = Dropout(dropout_p, seed)
        for rows in row_blocks(x):
            run_linear(to_y[rows], to_h[rows], drop(x[rows], rows.start), *factors)
    finish_write((y, to_y), (h, to_h))


class Dropout:
    """The mask of a seed, made natively."""

    def __init__(self, p: float, seed: Tensor) -> None:
        self.threshold, self.scale = dropout.threshold(p), dropout.keep_scale(p)
        self.seed = int(seed)

    def __call__(self, x: Tensor, first_row: int, *, scaled: bool = True) -> Tensor:
        """``dropout(x)`` of rows ``first_row …`` (M, K), new; or the same without its scale."""
        out = x.new_empty(x.shape)
        self._run(out, x, first_row, self.scale if scaled else 1.0, add=False)
        return out

    def add_(self, y: Tensor, x: Tensor, first_row: int) -> None:
        """Adds ``dropout(x)`` to y (M, K)."""
        self._run(y, x, first_row, self.scale, add=True)

    def _run(self, out: Tensor, x: Tensor, first_row: int, scale: float, *, add: bool) -> None:
        x = unit_columns(x)
        code = native.functions().fastlora_dropout(
            *matrix(out), *matrix(x), *x.shape, first_row, self.seed, self.threshold,
            scale, add, native.DTYPES[x.dtype], torch.get_num_threads(),
        )  # fmt: skip
        native.check(code, "dropout")


def run_linear(
    y: Tensor,
    h: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    lora_bias: Tensor | None,
    scaling: float,
) -> None:
    x = unit_columns(x)
    lora_bias = None if lora_bias is None else unit_columns(lora_bias)
    bias = None if bias is None else unit_columns(bias)
    (M, N), K, R = y.shape, x.shape[1], lora_A.shape[0]
    code = native.functions().fastlora_lora_linear(
        y.data_ptr(), y.stride(0), h.data_ptr(), h.stride(0), x.data_ptr(), x.stride(0),
        *matrix(weight), pointer(bias), lora_A.data_ptr(), *lora_A.stride(), lora_B.data_ptr(),
        *lora_B.stride(), pointer(lora_bias), M, K, N, R, scaling, native.DTYPES[x.dtype],
        native.DTYPES[lora_A.dtype], torch.get_num_threads(),
    )  # fmt: skip
    native.check(code, "lora_linear")


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
        g = dy.new_empty(dy.shape[0], lora_A.shape[0])
        drop = None if seed is None else Dropout(dropout_p, seed)
        _add_through(dx, g, dy, lora_A, lora_B, scaling, drop)
        if need_A and drop is not None:
            dA = _masked_gradient(g, x, lora_A, scaling, drop)
        elif need_A:
            dA = gradient(g, x, lora_A, scaling)
    wide = torch.promote_types(dy.dtype, torch.float32)
    grads = [
        dx,
        library.mm(dy.T, x) if need_weight else None,
        dy.sum(0) if need_bias else None,
        dA,
        gradient(h, dy, lora_B, scaling, transposed=True) if need_B else None,
        dy.sum(0, dtype=wide).mul_(scaling).to(lora_B.dtype) if need_lora_bias else None,
    ]
    return [grad for grad in grads if grad is not None]


def _add_through(
    dx: Tensor | None,
    g: Tensor,
    dy: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    drop: Dropout | None,
) -> None:
    """Fills ``g = dy @ lora_B``, adds ``dropout(scaling * g @ lora_A)`` to dx.

    It is lora_add_ with the factors' roles exchanged, g its h.
    """
    if dx is None:
        run_linear(g[:, :0], g, dy, None, None, lora_B.T, lora_A[:, :0].T, None, scaling)
    elif drop is None:
        run_linear(dx, g, dy, None, None, lora_B.T, lora_A.T, None, scaling)
    else:
        for rows in row_blocks(dx):
            part = torch.zeros_like(dx[rows])
            run_linear(part, g[rows], dy[rows], None, None, lora_B.T, lora_A.T, None, scaling)
            drop.add_(dx[rows], part, rows.start)


def _masked_gradient(g: Tensor, x: Tensor, lora_A: Tensor, scaling: float, drop: Dropout) -> Tensor:
    total = lora_A.new_zeros(lora_A.shape, dtype=torch.float32)
    for rows in row_blocks(x):
        seen = drop(x[rows], rows.start, scaled=False)
        total += gradient(g[rows], seen, total, scaling * drop.scale)
    return total.to(lora_A.dtype)


def gradient(
    left: Tensor, right: Tensor, like: Tensor, scaling: float, *, transposed: bool = False
) -> Tensor:
    """``scaling * left.T @ right`` (R, C), or its transpose, in the dtype of ``like``."""
    left, right = unit_columns(left), unit_columns(right)
    (M, R), C = left.shape, right.shape[1]
    out = right.new_empty((C, R) if transposed else (R, C), dtype=like.dtype)
    row, column = (1, R) if transposed else (C, 1)
    code = native.functions().fastlora_gradient(
        out.data_ptr(), row, column, *matrix(left), *matrix(right), M, R, C, scaling,
        native.DTYPES[right.dtype], native.DTYPES[out.dtype], torch.get_num_threads(),
    )  # fmt: skip
    native.check(code, "gradient")
    return out


def unit_columns(t: Tensor) -> Tensor:
    """The same values with unit columns."""
    return t if t.stride(-1) == 1 or t.numel() == 0 else t.contiguous()


def flat(t: _Given, dtype: torch.dtype) -> _Given:
    """The same numbers in that dtype, one behind the other."""
    if t is None or (t.dtype == dtype and t.is_contiguous()):
        return t
    return t.to(dtype).contiguous()


def matrix(t: Tensor | None) -> tuple[int | None, int]:
    return (None, 0) if t is None else (t.data_ptr(), t.stride(0))


def pointer(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


def writable(t: Tensor) -> Tensor:
    """What a kernel writes for t: itself, or a copy with unit columns and rows of their own."""
    own = t.stride(1) == 1 and (t.stride(0) >= t.shape[1] or t.shape[0] < 2)
    return t if own else t.clone(memory_format=torch.contiguous_format)


def finish_write(*pairs: tuple[Tensor, Tensor]) -> None:
    """Gives each tensor the values of what was written for it, see ``writable``."""
    for tensor, target in pairs:
        if target is tensor:
            mark_written(tensor)
        else:
            tensor.copy_(target)


def few(M: int, weight: Tensor, op: str) -> bool:
    """Whether the native product is the faster one, and can read the weight."""
    return choices.choose(op, weight.dtype).rows >= M and readable(weight)


def readable(weight: Tensor) -> bool:
    """Whether the native product can read the weight."""
    return weight.stride(1) == 1 and weight.numel() > 0


def product(
    x: Tensor, weight: Tensor, bias: Tensor | None, op: str, invariant: bool = False
) -> Tensor:
    """The base product of many rows."""
    natively = invariant or choices.choose(op, weight.dtype).native
    if not natively or not readable(weight):
        return library.linear(x, weight, bias)
    y, h = x.new_empty(x.shape[0], weight.shape[0]), x.new_empty(x.shape[0], 0)
    run_linear(y, h, x, weight, bias, x[:0], weight[:, :0], None, 0.0)
    return y
