"""The ops that change weights in place, on Triton."""

from __future__ import annotations

from functools import partial

import torch
import triton

from fastlora.backends.merge_lists import host as merge_ops
from fastlora.kernels.merge.merge import TritonKernels
from fastlora.kernels.tile import launch

_kernels = TritonKernels()

merge_ = partial(merge_ops.merge_, _kernels)
unmerge_ = partial(merge_ops.unmerge_, _kernels)
swap_ = partial(merge_ops.swap_, _kernels)


def merge_kernel(device: torch.device) -> str:
    """The arithmetic of d: another architecture's or compiler's may have other bits."""
    where = "interpreted" if launch.interpreted() else f"sm_{launch.arch_of(device)}"
    return f"triton-merge-1 {where} triton-{triton.__version__}"
