"""What every call of the CUDA library needs: pointers, the stream, and a reason where it cannot."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlora.backends.dtypes import HALVES
from fastlora.kernels.tile import gpu  # pyright: ignore[reportMissingImports]: it is in kernels/

arch_of, device_of = gpu.arch_of, gpu.device_of
# Multiprocessors with less than 100 KiB of shared memory for a block: Ampere, Ada and Blackwell
# beside the data centre's.
SMALL = (86, 87, 89, 110, 120, 121)


def stream_of(t: Tensor) -> int | None:
    return torch.cuda.current_stream(t.device).cuda_stream if t.is_cuda else None


def pointer(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


def chunks(name: str, t: Tensor, column: int = -1) -> str | None:
    """Why t is not read in chunks of 16 bytes along a dimension, or None when it can be."""
    column %= t.dim()
    if t.data_ptr() % 16:
        return f"{name} starts at no multiple of 16 bytes"
    if t.stride(column) != 1 and t.shape[column] > 1:
        return f"{name} has no unit stride"
    for d, (size, stride) in enumerate(zip(t.shape, t.stride(), strict=True)):
        if size % 8 if d == column else size > 1 and stride % 8:
            return f"{name} has sizes or strides that are no multiples of 8"
    return None


def halves(x: Tensor, lora_A: Tensor, lora_B: Tensor) -> str | None:
    """Why these dtypes are not taken, or None when they are."""
    if x.dtype not in HALVES:
        return f"x is {x.dtype}, not half precision"
    if lora_A.dtype != lora_B.dtype or lora_A.dtype not in (x.dtype, torch.float32):
        return f"adapters of {lora_A.dtype} and {lora_B.dtype} beside {x.dtype}"
    return None
