"""The CUDA C++ kernels of csrc/cuda as ops: the backend ``"cuda"``.

Half-precision linears of one adapter with the gradient for x, up to 64 rows of many adapters, and
merging of any weights. What the kernels do not take runs on the next backend, with one logged line
that has the reason. A library compiled for the host runs the same kernels on CPU tensors, without a
GPU: for tests.
"""

from collections.abc import Sequence
from typing import Any

from fastlora.backends.cuda import linear, multi
from fastlora.backends.cuda.linear import GRADIENTS, lora_linear, lora_linear_backward
from fastlora.backends.cuda.merge import merge_, merge_kernel, swap_, unmerge_
from fastlora.backends.cuda.multi import (
    multi_lora_add_,
    multi_lora_linear,
    packed_lora_add_,
    packed_lora_linear,
)

_REFUSALS = {
    "lora_linear": linear.refuse_linear,
    "lora_linear_backward": linear.refuse_backward,
    "multi_lora_linear": multi.refuse_linear,
    "multi_lora_add_": multi.refuse_add,
    "packed_lora_linear": multi.refuse_packed_linear,
    "packed_lora_add_": multi.refuse_packed_add,
}


def refuses(op: str, operands: Sequence[Any], **options: Any) -> str | None:
    """Says why the kernels do not take such a call of ``op``, or None when they do."""
    if op not in globals():
        return "they have none"  # of many adapters' gradients
    return _REFUSALS[op](*operands, **options) if op in _REFUSALS else None
