"""What writing an operand in place owes to others: to autograd, and to what shares its memory."""

from __future__ import annotations

from torch import _C, Tensor
from torch.autograd.graph import increment_version


def mark_written(*tensors: Tensor) -> None:
    """Tells autograd what a kernel wrote, which it does not see."""
    for tensor in tensors:
        if not tensor.is_inference():
            increment_version(tensor)


def share_memory(x: Tensor, y: Tensor) -> bool:
    """Whether writing y may change x."""
    return _C._is_alias_of(y, x)  # pyright: ignore[reportAttributeAccessIssue]


def copy_if_shared(x: Tensor, y: Tensor) -> Tensor:
    """x as it is before y is written: a copy where the two share memory."""
    return x.clone() if share_memory(x, y) else x
