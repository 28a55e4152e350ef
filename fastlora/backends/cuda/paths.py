"""The paths of the CUDA kernels, and which of them passed their tests on a GPU."""

from __future__ import annotations

import importlib
from functools import lru_cache

import torch

from fastlora.backends import native

PATHS = ("cuda_one_pass", "cuda_two_pass", "cuda_overlapped", "cuda_decode", "cuda_in_place")
_DTYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


def versions() -> dict[str, str]:
    """What the user's own rows of verified paths hold for: this library."""
    return {"cuda_library": f"{native.ABI_VERSION} {compiler()}"}


def compiler() -> str:
    return native.cuda_functions().fastlora_cuda_compiler().decode()


def dtype_name(dtype: torch.dtype, lora_dtype: torch.dtype | None) -> str:
    """As rows name it: bf16, or bf16+fp32 with float32 adapters."""
    return _DTYPES[dtype] + ("" if lora_dtype in (None, dtype) else f"+{_DTYPES[lora_dtype]}")


@lru_cache
def verified(op: str, dtype: str | None, arch: int) -> tuple[str, ...]:
    """The paths of op that passed their test on such a GPU, in this dtype or, if None, in any."""
    records = importlib.import_module("fastlora.kernels.choose.records")
    return records.verified(op, dtype, arch, PATHS, versions())


def forget() -> None:
    """Reads the files anew at the next call."""
    verified.cache_clear()
