"""Ops of programs that torch.export and torch.jit.trace write down: differentiable by themselves.

Both record ops and lose the ``autograd.Function`` around them, so a program that is trained would
silently leave the adapters out. These ops are made of the Function; decompositions and compilers
see what is in them. A program that is loaded needs ``import fastlora`` first, which defines them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, library
from torch.autograd import Function

from fastlora.functional.autograd import LoRAAdd, LoRALinear, MultiLoRAAdd, MultiLoRALinear
from fastlora.functional.rows import is_tracked
from fastlora.ops.table import OPS

_FUNCTIONS: dict[str, type[Function]] = {
    "lora_linear": LoRALinear,
    "lora_add_": LoRAAdd,
    "multi_lora_linear": MultiLoRALinear,
    "multi_lora_add_": MultiLoRAAdd,
}


def written() -> bool:
    """Whether what runs is being written down as a program."""
    if torch.compiler.is_compiling():
        # Not is_exporting(), which in torch 2.10 is true of all that is compiled.
        return torch.compiler._is_exporting_flag
    return torch._C._is_tracing()


def call(name: str, *args: Any) -> Any:
    """The Function of the op ``name`` on args, as an op that keeps its gradients in a program.

    Returns y, or None where it was written in place.
    """
    return getattr(torch.ops.fastlora, f"differentiable_{name}")(*args)


def _differentiable(name: str, function: type[Function]) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        tracked = is_tracked(*(t for t in args if isinstance(t, Tensor)))
        result = (function.apply if tracked else function.forward)(*args)
        return None if name.endswith("_") else result[0]

    return run


_library = library.Library("fastlora", "FRAGMENT")
for _name, _function in _FUNCTIONS.items():
    _schema = OPS[_name]._replace(result="()" if OPS[_name].in_place else "Tensor").schema
    if _function is LoRAAdd:
        _schema = _schema.replace("Tensor? lora_bias, ", "")
    _library.define(f"differentiable_{_schema}")
    _run = _differentiable(_name, _function)
    _library.impl(f"differentiable_{_name}", _run, "CompositeImplicitAutograd")
