"""What the public functions share: rows as matrices, scratch, and whether autograd sees a call."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastlora.backends.in_place import copy_if_shared
from fastlora.functional.checks import linear as checks


def kind_of(x: Tensor, lora_A: Tensor) -> tuple[torch.device, torch.dtype, torch.dtype, int]:
    """What decides about the backend of a call."""
    return x.device, x.dtype, lora_A.dtype, lora_A.shape[-2]


def as_rows(x: Tensor) -> Tensor:
    """x (..., K) as a matrix (M, K)."""
    if x.dim() == 2:
        return x
    return x.flatten(0, -2) if x.dim() > 1 else x.unsqueeze(0)


def copy_rows_back(y: Tensor, rows: Tensor) -> Tensor:
    """Returns y with what was written to ``rows = as_rows(y)``, which may be no view of it."""
    lead = [(y.shape[i], y.stride(i)) for i in range(y.dim() - 1) if y.shape[i] != 1]
    view = all(outer == size * inner for (_, outer), (size, inner) in pairwise(lead))
    return y if view else y.copy_(rows.view_as(y))


def keep_input(rows: Tensor, y: Tensor) -> Tensor:
    """x as backward will need it, although y is written: a copy where the two share memory.

    Raises RuntimeError for a y that autograd does not let be written.
    """
    checks.tracked_output(y)
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return rows
    return copy_if_shared(rows, y)


def new_scratch(R: int, x: Tensor, *others: Tensor | None) -> Tensor:
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
