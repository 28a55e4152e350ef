"""What the public functions share: rows, scratch, and whether autograd must see a call."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastlora.backends.packed import unshared
from fastlora.functional.checks import linear as checks


def kind_of(x: Tensor, lora_A: Tensor) -> tuple[torch.device, torch.dtype, torch.dtype, int]:
    """What decides about the backend of a call."""
    return x.device, x.dtype, lora_A.dtype, lora_A.shape[-2]


def as_rows(x: Tensor) -> Tensor:
    """x (..., K) as a matrix (M, K)."""
    if x.dim() == 2:
        return x
    return x.flatten(0, -2) if x.dim() > 1 else x.unsqueeze(0)


def written_back(y: Tensor, rows: Tensor) -> Tensor:
    """y, once ``rows = as_rows(y)`` was written: copied back where rows could be no view of y."""
    lead = [(y.shape[i], y.stride(i)) for i in range(y.dim() - 1) if y.shape[i] != 1]
    view = all(outer == size * inner for (_, outer), (size, inner) in pairwise(lead))
    return y if view else y.copy_(rows.view_as(y))


def kept(rows: Tensor, y: Tensor) -> Tensor:
    """x as backward will need it, although y is written: a copy where the two share memory."""
    checks.tracked_output(y)
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return rows
    return unshared(rows, y)


def scratch(R: int, x: Tensor, *others: Tensor | None) -> Tensor:
    """An empty h (M, R); under vmap it is batched where anything is that it will be made of."""
    if not torch._C._are_functorch_transforms_active():
        return x.new_empty(x.shape[0], R)
    parts = [t.new_zeros((), dtype=x.dtype) for t in (x, *others) if t is not None]
    return torch.stack(parts).sum().expand(x.shape[0], R).clone()


def is_tracked(*tensors: Tensor | None) -> bool:
    """Whether autograd must see the call: a Function costs a decode step more than the op does.

    Under torch.func, and in forward mode, tensors do not tell: there it always sees the call.
    Raises RuntimeError where torch.func is compiled: torch 2.13 would make its gradients zero.
    """
    if torch._C._are_functorch_transforms_active():
        if torch.compiler.is_compiling():
            raise RuntimeError("torch.func around LoRA ops cannot be compiled: run it eagerly")
        return True
    if forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
