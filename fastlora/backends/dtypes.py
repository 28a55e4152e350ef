"""Which dtypes numbers and their raw bits have."""

from __future__ import annotations

import torch

HALVES = (torch.float16, torch.bfloat16)
# What kernels take, and what layers and plain torch do.
KERNEL_FLOATS = (*HALVES, torch.float32)
FLOATS = (*KERNEL_FLOATS, torch.float64)
# Integers as wide as a float of so many bytes.
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
