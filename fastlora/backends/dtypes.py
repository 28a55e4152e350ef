"""Which dtypes numbers and their raw bits have."""

from __future__ import annotations

import torch

HALVES = (torch.float16, torch.bfloat16)
UP_TO_FLOAT32 = (*HALVES, torch.float32)
FLOATS = (*UP_TO_FLOAT32, torch.float64)
# Integers as wide as a float of so many bytes.
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
# As safetensors' headers name them.
CODES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
