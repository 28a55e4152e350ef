"""torch.compile as a provider: one compilation serves every copy of a case's operands."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from functools import cache, partial
from importlib.util import find_spec
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import nn

from benchmarks.harness.work import Absent, Builder, Call, Case, Operands

Function = Callable[[], Any]
Compile = Callable[[Function], Function]
Compilable = Callable[[Case, Operands, Compile], Call]

# In what torch and triton say where a machine cannot compile at all.
_NO_COMPILER = re.compile(r"C(\+\+)? compiler|Python\.h")


def as_it_is(function: Function) -> Function:
    return function


def whole(builder: Builder) -> Compilable:
    """Of a builder all of whose call can be compiled."""
    return lambda case, o, wrap: wrap(builder(case, o))


def compiled(builder: Compilable, case: Case, o: Operands) -> Call:
    """``builder``'s call, with what it passes through its third argument compiled.

    In one graph, for this shape alone, with Inductor's defaults. It is compiled here, its backward
    too, before anything is timed; the guards that a compiled function checks are timed.
    """
    if case.dropout:
        raise Absent("compiled code draws its dropout masks in a way that cannot be repeated")
    call = builder(case, o, partial(_compile, case))
    try:
        call()
    except torch._dynamo.exc.Unsupported as error:
        first = str(error).splitlines()[0]
        raise Absent(f"torch.compile makes no single graph of it: {first}") from error
    except Exception as error:
        if _NO_COMPILER.search(str(error)) is None:
            raise
        raise Absent(f"torch.compile cannot compile here: {str(error).splitlines()[0]}") from error
    return call


def compiled_module(module: nn.Module, device: str) -> Any:
    """The module as its user compiles it, by its first call.

    Modules of one kind and shape share a compilation. ``Absent`` where there would be no compiler.
    """
    if device == "cuda" and find_spec("triton") is None:
        raise Absent("torch.compile needs triton on a GPU")
    if not any(shutil.which(name) for name in (os.environ.get("CXX", ""), "g++", "clang++")):
        raise Absent("torch.compile needs a C++ compiler: none in CXX, no g++, no clang++")
    return torch.compile(module)


def _compile(case: Case, function: Function) -> Function:
    """A copy's operands are in the closure, whose values the compiled code takes as arguments."""
    assert isinstance(function, FunctionType)
    code = _code_for(function.__code__, case.device, case.name)
    same = FunctionType(code, function.__globals__, closure=function.__closure__)
    return torch.compile(same, fullgraph=True, dynamic=False)


@cache
def _code_for(code: CodeType, *case: str) -> CodeType:
    """Compilations belong to a code object and are limited in number: each case has its own."""
    return code.replace()
