"""Calls of the ops, past torch's dispatcher where nobody would notice it."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from fastlora.inspection.plain_tensors import explain_unreadable
from fastlora.ops.registration import register_flops
from fastlora.ops.run import IMPLEMENTATIONS

# Types of operands that are no tensors; a tuple is of bools: which gradients are needed.
_VALUES = {type(None), float, int, bool, str, tuple}


def call(name: str, *args: Any) -> Any:
    """Runs ``torch.ops.fastlora.<name>(*args)`` on operands that autograd does not track.

    Straight to the implementation where nothing on the way would look: torch's dispatcher and its
    way back into Python cost a small layer a tenth of its time on a CPU.
    """
    if torch.compiler.is_compiling():
        return getattr(torch.ops.fastlora, name)(*args)
    plain = _are_plain(args)
    if not plain:
        _refuse_sharded(name, args)
    if is_watched() or not plain:
        register_flops()
        try:
            return getattr(torch.ops.fastlora, name)(*args)
        except (NotImplementedError, TypeError) as error:
            _name_unreadable(name, args, error)
            raise
    return IMPLEMENTATIONS[name](*args)


def is_watched() -> bool:
    """Whether a transform, a mode, a tracer or a profiler sees the ops that run."""
    return bool(
        torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._is_tracing()
        or torch.autograd._profiler_enabled()  # pyright: ignore[reportPrivateImportUsage]
    )


def _are_plain(values: Sequence[Any]) -> bool:
    """Whether operands are what they seem: no subclass, nothing still to be done, and there."""
    for value in values:
        kind = type(value)
        if kind is Tensor or kind is Parameter:
            if value.is_neg() or value.is_meta or value._is_zerotensor():
                return False
        elif kind not in _VALUES:
            return False
    return True


def _refuse_sharded(name: str, args: Sequence[Any]) -> None:
    """Raises TypeError for a DTensor: only a layer knows where its parts lie and what is a sum."""
    if "torch.distributed.tensor" not in sys.modules:
        return
    for argument, part in _name_operands(name, args):
        if hasattr(part, "placements"):
            raise TypeError(
                f"{argument}: expected a tensor that this process holds whole, got a DTensor: "
                "a layer under parallelize_module takes one, or give all operands' to_local()"
            )


def _name_unreadable(name: str, args: Sequence[Any], error: Exception) -> None:
    """Raises TypeError for an operand, as a quantized weight, whose class does not know the op."""
    for argument, part in _name_operands(name, args):
        kind = explain_unreadable(part) if isinstance(part, Tensor) else None
        if kind is not None:
            raise TypeError(f"{argument}: expected a plain tensor, got {kind}") from error


def _name_operands(name: str, args: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    """Pairs each operand with its argument's name, those of a list one by one."""
    schema = getattr(torch.ops.fastlora, name).default._schema
    for argument, value in zip(schema.arguments, args, strict=True):
        for part in value if isinstance(value, list | tuple) else (value,):
            yield argument.name, part
