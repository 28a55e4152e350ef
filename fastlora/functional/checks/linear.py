"""What the functions accept: every check names the argument, its value and what was expected."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastlora.backends.dtypes import FLOATS, UP_TO_FLOAT32


def autocast(
    x: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Casts as autocast casts a linear's operands, float64 left alone; else returns them."""
    tensor("x", x)
    if not _autocasts(x):
        return x, weight, bias
    dtype = torch.get_autocast_dtype(x.device.type)
    return _cast(x, dtype), _cast(weight, dtype), _cast(bias, dtype)


def autocast_to(x: Tensor, y: Tensor) -> Tensor:
    """Under autocast x in y's dtype, which the base layer has chosen."""
    tensor("x", x)
    tensor("y", y)
    return x.to(y.dtype) if _autocasts(x) else x


def scaling(value: float) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"scaling: expected a float, got {type(value).__name__}")
    # Not math.isfinite: torch.compile cannot trace it on a scaling that changes between calls.
    if not -math.inf < value < math.inf:
        raise ValueError(f"scaling: expected a finite number, got {value}")
    return float(value)


def dropout(p: float) -> float:
    if not isinstance(p, (int, float)) or isinstance(p, bool):
        raise TypeError(f"dropout_p: expected a float, got {type(p).__name__}")
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"dropout_p: expected a probability in [0, 1], got {p}")
    return float(p)


def linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    lora_bias: Tensor | None,
) -> None:
    N, K = matrix_of(weight)
    input_of(x, K, weight.dtype, weight.device)
    adapter(lora_A, lora_B, N, K, x)
    vector("bias", bias, N, x.dtype, x)
    vector("lora_bias", lora_bias, N, lora_B.dtype, x)


def added(y: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor) -> None:
    tensor("lora_A", lora_A)
    tensor("lora_B", lora_B)
    N = lora_B.shape[0] if lora_B.dim() == 2 else -1
    K = lora_A.shape[1] if lora_A.dim() == 2 else -1
    adapter(lora_A, lora_B, N, K, x)
    output_of(y, x, N, K)


def _autocasts(x: Tensor) -> bool:
    if not torch._C._is_any_autocast_enabled():
        return False
    # torch knows no autocast for meta tensors and raises.
    device = x.device.type
    return device != "meta" and torch.is_autocast_enabled(device)


def _cast(t: Any, dtype: torch.dtype) -> Any:
    return t.to(dtype) if isinstance(t, Tensor) and t.dtype in UP_TO_FLOAT32 else t


def tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")


def matrix_of(weight: Tensor) -> tuple[int, int]:
    tensor("weight", weight)
    shape = weight.shape
    if weight.dtype not in FLOATS:
        raise TypeError(f"weight: expected one of {names(FLOATS)}, got {weight.dtype}")
    if len(shape) != 2:
        raise ValueError(f"weight: expected shape (N, K), got {tuple(shape)}")
    return shape[0], shape[1]


def input_of(
    x: Tensor, K: int, dtype: torch.dtype, device: torch.device, whose: str = "the weight's"
) -> None:
    shape = x.shape
    if not shape or shape[-1] != K:
        raise ValueError(f"x: expected shape (..., {K}), got {tuple(shape)}")
    if x.dtype != dtype:
        raise TypeError(f"x: expected {whose} dtype {dtype}, got {x.dtype}")
    if x.device != device:
        raise ValueError(f"x: expected {whose} device {device}, got {x.device}")


def output_of(y: Tensor, x: Tensor, N: int, K: int) -> None:
    input_of(x, K, y.dtype, y.device, "y's")
    if y.dtype not in FLOATS:
        raise TypeError(f"y: expected one of {names(FLOATS)}, got {y.dtype}")
    if y.shape != (*x.shape[:-1], N):
        raise ValueError(f"y: expected shape {(*x.shape[:-1], N)}, got {tuple(y.shape)}")
    if 0 in y.stride() and any(
        stride == 0 and size > 1 for stride, size in zip(y.stride(), y.shape, strict=True)
    ):
        raise ValueError(
            f"y: expected elements of their own, got an expanded tensor of strides {y.stride()}"
        )


def tracked_output(y: Tensor) -> None:
    """Refuses a y that autograd would not let be written; torch does so after it was."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return
    for tensor in (y, y._base):
        if tensor is not None and tensor.requires_grad and tensor.is_leaf:
            raise RuntimeError("y: expected a layer's output, got a leaf that requires grad")
    views = torch._C._autograd  # pyright: ignore[reportAttributeAccessIssue]
    if y._base is not None and views._get_creation_meta(y) != views.CreationMeta.DEFAULT:
        raise RuntimeError(
            "y: expected a tensor that autograd lets be written in place, got a view made by "
            "chunk, split or unbind, or without gradients: clone it"
        )
    if y.is_inference():
        raise RuntimeError("y: expected a tensor made outside of inference mode: clone it")


def not_differentiable(**tensors: object) -> None:
    """Refuses what would silently get no gradient."""
    if not torch.is_grad_enabled():
        return
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor) and tensor.requires_grad:
            raise ValueError(f"{name}: expected one that requires no grad, it gets none: detach it")


def adapter(lora_A: Tensor, lora_B: Tensor, N: int, K: int, x: Tensor) -> None:
    tensor("lora_A", lora_A)
    tensor("lora_B", lora_B)
    shape = lora_A.shape
    if len(shape) != 2 or shape[1] != K:
        raise ValueError(f"lora_A: expected shape (R, {K}), got {tuple(shape)}")
    R = shape[0]
    if lora_B.shape != (N, R):
        raise ValueError(f"lora_B: expected shape ({N}, {R}), got {tuple(lora_B.shape)}")
    pair(lora_A, lora_B, x)


def pair(lora_A: Tensor, lora_B: Tensor, x: Tensor) -> None:
    if lora_A.dtype not in FLOATS:
        raise TypeError(f"lora_A: expected one of {names(FLOATS)}, got {lora_A.dtype}")
    if lora_B.dtype != lora_A.dtype:
        raise TypeError(f"lora_B: expected lora_A's dtype {lora_A.dtype}, got {lora_B.dtype}")
    device = x.device
    for name, tensor in (("lora_A", lora_A), ("lora_B", lora_B)):
        if tensor.device != device:
            raise ValueError(f"{name}: expected the device {device}, got {tensor.device}")


def vector(name: str, value: Tensor | None, size: int, dtype: torch.dtype, x: Tensor) -> None:
    if value is None:
        return
    tensor(name, value)
    if value.shape != (size,):
        raise ValueError(f"{name}: expected shape ({size},), got {tuple(value.shape)}")
    if value.dtype != dtype:
        raise TypeError(f"{name}: expected dtype {dtype}, got {value.dtype}")
    if value.device != x.device:
        raise ValueError(f"{name}: expected the device {x.device}, got {value.device}")


def names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
