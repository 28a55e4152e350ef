"""What ``fastlora check`` and ``tune`` judge by: each dtype's tolerance, and the error over it.

A result may err by twice what unfused torch errs in the same dtype, plus a slack.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# (dtype of x and weight, dtype of the adapters), by the names that rows have; tf32 is fp32 as a
# tensor core multiplies it.
DTYPES = {
    "fp32": (torch.float32, torch.float32),
    "tf32": (torch.float32, torch.float32),
    "fp16": (torch.float16, torch.float16),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp16+fp32": (torch.float16, torch.float32),
    "bf16+fp32": (torch.bfloat16, torch.float32),
}
SLACK = {"fp32": 1e-6, "tf32": 1e-6, "fp16": 3e-4, "bf16": 2e-3}
# Rounding errors of a single number, relative to it.
_EPS = {"fp32": 2**-23, "tf32": 2**-10, "fp16": 2**-10, "bf16": 2**-7}

Product = Callable[[Tensor, Tensor], Tensor]


class WrongResult(Exception):
    """An op ran and what it returned is not right."""


def lay_out(t: Tensor, layout: str) -> Tensor:
    """Copies a tensor; the copy's elements lie as awkwardly as a caller may have them."""
    if layout == "strided":
        spread = t.new_full((*t.shape[:-1], 2 * t.shape[-1]), math.nan)
        spread[..., ::2] = t
        return spread[..., ::2]
    if layout == "misaligned":
        return t.new_empty(t.numel() + 1)[1:].copy_(t.flatten()).view(t.shape)
    return t.clone(memory_format=torch.contiguous_format)


def choose_product(name: str) -> Product:
    """Returns unfused torch's product in this dtype.

    For tf32 it cuts the operands as a tensor core does: the library may compute small products in
    full float32, which must not decide what passes.
    """
    if name != "tf32":
        return torch.matmul

    def cut(t: Tensor) -> Tensor:
        return (t.contiguous().view(torch.int32) & -(1 << 13)).view(torch.float32)

    return lambda a, b: torch.matmul(cut(a), cut(b))


def compute_error_ratio(got: Tensor, want: Tensor, unfused: Tensor, name: str) -> float:
    """Computes the error of got over the one it may have: more than 1, or NaN, is wrong."""
    name = name.split("+")[0]
    if got.shape != want.shape:
        return math.inf
    norm = want.norm().item() or 1.0

    def error(t: Tensor) -> float:
        return (t.to(want.device, want.dtype) - want).norm().item() / norm

    # By luck unfused torch may have none of a few numbers wrong.
    least = _EPS[name] if got.numel() < 64 else 0.0
    return error(got) / (2 * max(error(unfused), least) + SLACK[name])


@contextmanager
def fill_empty_with_nan() -> Iterator[None]:
    """Makes unwritten outputs show: in its deterministic mode torch fills new memory with NaN."""
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
