"""One adapter's linear as functions: argument checks and autograd around one op each."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

from fastlora.backends import dropout
from fastlora.backends.dtypes import HALVES
from fastlora.backends.torch import products as library
from fastlora.functional import export
from fastlora.functional.autograd import LoRAAdd, LoRALinear
from fastlora.functional.checks import linear as checks
from fastlora.functional.rows import as_rows, is_tracked, keep_input, kind_of, new_scratch
from fastlora.ops import dispatch, invariance
from fastlora.ops.call import call


def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    *,
    bias: Tensor | None = None,
    lora_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    training: bool = False,
) -> Tensor:
    """``x @ weight.T + bias + scaling * ((dropout(x) @ lora_A.T) @ lora_B.T + lora_bias)``.

    - x (..., K), weight (N, K), bias (N,): of one dtype, float16, bfloat16, float32 or float64
    - lora_A (R, K), lora_B (N, R), lora_bias (N,): of one dtype of their own; float32 on a
      half-precision base is usual
    - dropout_p: of the LoRA branch alone, with ``training=True``. The mask follows from a seed
      drawn from torch's generator; backward makes it again, so it is never stored

    Returns (..., N) in x's dtype, differentiable once in every tensor. Raises TypeError or
    ValueError naming the argument that does not fit.
    """
    x, weight, bias = checks.autocast(x, weight, bias)
    checks.linear(x, weight, lora_A, lora_B, bias, lora_bias)
    scaling, dropout_p = checks.scaling(scaling), checks.dropout(dropout_p)
    p, seed = _dropout(dropout_p, training, x)
    invariant, backend = invariance.asked(), dispatch.choose("lora_linear", *kind_of(x, lora_A))
    operands = (as_rows(x), weight, bias, lora_A, lora_B, lora_bias, scaling, p, seed)
    args = (*operands, invariant, backend)
    tracked = is_tracked(x, weight, bias, lora_A, lora_B, lora_bias)
    if export.written():
        y = export.call("lora_linear", *args)
    else:
        y, _ = LoRALinear.apply(*args) if tracked else call("lora_linear", *args)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], weight.shape[0])


def base_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ weight.T + bias``: torch's, or that of a LoRA of no rank where ours differs.

    That is within ``batch_invariant``, and where torch might read past rows, forward or backward.
    """
    if not invariance.asked() and not _reads_past_rows(weight):
        return nnf.linear(x, weight, bias)
    N, K = weight.shape
    return lora_linear(x, weight, weight.new_empty(0, K), weight.new_empty(N, 0), 0.0, bias=bias)


def _reads_past_rows(weight: Tensor) -> bool:
    """Whether torch may read past rows of x (..., K) or of a gradient (..., N) on some machine."""
    N, K = weight.shape
    if (N % library.STEP == 0 == K % library.STEP) or weight.device.type != "cpu":
        return False
    autocast = torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu") if autocast else weight.dtype
    return dtype in HALVES and type(weight) in (Tensor, nn.Parameter)


def lora_add_(
    y: Tensor,
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    *,
    dropout_p: float = 0.0,
    training: bool = False,
) -> Tensor:
    """Adds ``scaling * (dropout(x) @ lora_A.T) @ lora_B.T`` to y in place and returns y.

    For bases that are not a plain weight.

    - y (..., N): any base layer's output for x
    - x (..., K): of y's dtype; under autocast it is cast to that
    - lora_A (R, K), lora_B (N, R), dropout_p: as in ``lora_linear``

    Differentiable in y, x, lora_A, lora_B. Errors as in ``lora_linear``.
    """
    x = checks.autocast_to(x, y)
    checks.added(y, x, lora_A, lora_B)
    scaling, dropout_p = checks.scaling(scaling), checks.dropout(dropout_p)
    p, seed = _dropout(dropout_p, training, x)
    rows, tracked = as_rows(x), is_tracked(y, x, lora_A, lora_B)
    if tracked:
        rows = keep_input(rows, y)
    h = new_scratch(lora_A.shape[0], rows, lora_A, seed)
    invariant, backend = invariance.asked(), dispatch.choose("lora_add_", *kind_of(x, lora_A))
    args = (y, h, rows, lora_A, lora_B, scaling, p, seed, invariant, backend)
    if export.written():
        export.call("lora_add_", *args)
        return y
    return LoRAAdd.apply(*args) if tracked else LoRAAdd.forward(*args)


def _dropout(p: float, training: bool, x: Tensor) -> tuple[float, Tensor | None]:
    drops = training and dropout.threshold(p) > 0
    return (p, dropout.new_seed(x.device)) if drops else (0.0, None)
