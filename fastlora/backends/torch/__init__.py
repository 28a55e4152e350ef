"""Every op in plain torch: the backend ``"torch"``, on any device.

Lean rather than naive: the base product is one library GEMM, the LoRA part is accumulated onto it
in place, so the only M*N tensor is the result and no N*K tensor is made. Adapters of a wider dtype
are narrowed to x's for the products (the library accumulates in float32), never x widened;
gradients of float32 adapters on a half-precision x are summed in float32 over blocks of rows.
"""

from fastlora.backends.torch.linear import lora_add_, lora_linear, lora_linear_backward
from fastlora.backends.torch.merge import merge_, merge_kernel, swap_, unmerge_
from fastlora.backends.torch.multi import (
    group_rows,
    multi_lora_add_,
    multi_lora_linear,
    multi_lora_linear_backward,
    packed_lora_add_,
    packed_lora_linear,
)
