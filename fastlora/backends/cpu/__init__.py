"""The native CPU kernels as ops: the backend ``"cpu"``.

Few rows run in one native call, which reads the weight once for everything. For many rows the base
product stays torch's, whose GEMM is faster there, and the adapter's part is added natively. What
the native kernels do not take (a weight without unit columns, dropout) runs in plain torch, from
``fastlora/backends/torch``.
"""

from fastlora.backends.cpu.linear import lora_add_, lora_linear, lora_linear_backward
from fastlora.backends.cpu.merge import merge_, merge_kernel, swap_, unmerge_
from fastlora.backends.cpu.multi import (
    multi_lora_add_,
    multi_lora_linear,
    multi_lora_linear_backward,
    packed_lora_add_,
    packed_lora_linear,
)
from fastlora.backends.torch.multi import group_rows
