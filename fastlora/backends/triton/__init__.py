"""The Triton kernels as ops: the backend ``"triton"``, of one adapter and of many."""

from fastlora.backends.triton.linear import lora_add_, lora_linear, lora_linear_backward
from fastlora.backends.triton.merge import merge_, merge_kernel, swap_, unmerge_
from fastlora.backends.triton.multi import (
    multi_lora_add_,
    multi_lora_linear,
    multi_lora_linear_backward,
    packed_lora_add_,
    packed_lora_linear,
)
