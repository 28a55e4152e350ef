"""The ops that change weights in place, on Triton."""

from __future__ import annotations

import torch
import triton

from fastlora.backends.merge_lists.host import ByKind
from fastlora.kernels.merge.merge import TritonKernels
from fastlora.kernels.tile import launch

_ops = ByKind(TritonKernels())
merge_, unmerge_, swap_ = _ops.merge_, _ops.unmerge_, _ops.swap_


def merge_kernel(device: torch.device) -> str:
    """The arithmetic of d: another architecture's or compiler's may have other bits."""
    where = "interpreted" if launch.interpreted() else f"sm_{launch.arch_of(device)}"
    return f"triton-merge-1 {where} triton-{triton.__version__}"
