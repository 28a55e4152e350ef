"""The device of a tensor, and its facts; off a GPU those of the machine that tests stand in for."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache

import torch
from torch import Tensor


def device_of(t: Tensor) -> AbstractContextManager[object]:
    """The device that a kernel on t launches on; on the host there is none to choose."""
    return torch.cuda.device_of(t) if t.is_cuda else nullcontext()


def arch_of(device: torch.device) -> int:
    """Compute capability as 10 * major + minor; 90 on the host, which runs every path."""
    return _arch(device.index or 0) if device.type == "cuda" else 90


def programs_of(device: torch.device) -> int:
    """Multiprocessors, of which a persistent grid gives each one program."""
    return _multiprocessors(device.index or 0) if device.type == "cuda" else 3


@lru_cache
def _arch(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


@lru_cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count
