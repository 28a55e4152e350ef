"""Which backends there are, and why one cannot run: not here at all, or not such a call."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from fastlora.backends import native
from fastlora.backends.dtypes import UP_TO_FLOAT32

# Best first; "torch" implements every op on every device.
BACKENDS = ("cuda", "triton", "cpu", "torch")

_TRITON_RANKS = 512


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # hidden: sys.modules[package] is None
        return False


# Facts of the process, read once: torch.compile traces what reads them.
_TRITON = _installed("triton")
_INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


_Function = TypeVar("_Function", bound=Callable[..., Any])


def constant(function: _Function) -> _Function:
    """Make torch.compile take a function's answer instead of tracing it.

    What torch's own ``assume_constant_result`` sets, without loading the compiler.
    """
    function._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]
    return function


def check_name(name: str) -> str:
    """Returns a backend's name; raises ValueError for any other."""
    if name not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {name!r}")
    return name


def unusable(backend: str) -> str | None:
    """Why ``backend`` cannot run here, or None when it can."""
    if check_name(backend) == "torch":
        return None
    if backend == "cpu":
        return no_cpu_library()
    if backend == "cuda":
        reason = no_cuda_library()
        return reason if reason is not None or _cuda_on_host() else no_gpu()
    if not _TRITON:
        return "triton is not installed"
    reason = no_gpu()
    if reason is not None and not _INTERPRETED:
        return f"{reason}, and TRITON_INTERPRET=1 was not set at the start"
    return None


@constant
def no_cpu_library() -> str | None:
    return native.unusable()


@constant
def no_cuda_library() -> str | None:
    library = native.load_cuda()
    return library if isinstance(library, str) else None


@constant
def _cuda_on_host() -> bool:
    return native.cuda_on_host()


@constant
def no_gpu() -> str | None:
    """Why there is no NVIDIA GPU to use, or None where there is one."""
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    return None if torch.cuda.is_available() else "no CUDA GPU was found"


def cannot(
    backend: str,
    device: torch.device,
    dtype: torch.dtype | None = None,
    lora_dtype: torch.dtype | None = None,
    rank: int = 0,
) -> str | None:
    """Why ``backend`` cannot run such a call, or None when it can."""
    reason = unusable(backend)
    if reason is not None or backend == "torch":
        return reason
    if backend == "cpu":
        return _cannot_natively(device, dtype, lora_dtype)
    kernels = "CUDA" if backend == "cuda" else "Triton"
    without_gpu = _cuda_on_host() if backend == "cuda" else _INTERPRETED
    expected = "cpu" if backend == "cuda" and without_gpu else "cuda"
    if device.type != expected and not (without_gpu and device.type == "cpu"):
        return f"{kernels} kernels run on {expected.upper()} tensors, got tensors on {device}"
    if device.type == "cuda" and capability(device) < (8, 0):
        return f"{kernels} kernels run on GPUs of compute capability 8.0 or more, {device} has less"
    for each in (dtype, lora_dtype):
        if each is not None and each not in UP_TO_FLOAT32:
            return f"{kernels} kernels take float16, bfloat16 and float32, got {each}"
    if rank > _TRITON_RANKS and backend == "triton":
        return f"Triton kernels take ranks up to {_TRITON_RANKS}, got {rank}"
    return None


def _cannot_natively(
    device: torch.device, dtype: torch.dtype | None, lora_dtype: torch.dtype | None
) -> str | None:
    if device.type != "cpu":
        return f"the CPU kernels run on CPU tensors, got tensors on {device}"
    if dtype is not None and dtype not in native.DTYPES:
        return f"the CPU kernels take float16, bfloat16 and float32, got {dtype}"
    if lora_dtype not in (None, dtype, torch.float32):
        return f"the CPU kernels take adapters of {dtype} or float32 beside it, got {lora_dtype}"
    return None


@constant
def capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)
