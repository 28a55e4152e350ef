"""Providers under torch.compile: one compilation serves every copy of a case's operands."""

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

from benchmarks.harness.case import Absent, Builder, Call, Case, Operands

Function = Callable[[], Any]
Compile = Callable[[Function], Function]
Compilable = Callable[[Case, Operands, Compile], Call]

# Part of torch's and triton's errors where a machine cannot compile at all.
_NO_COMPILER = re.compile(r"C(\+\+)? compiler|Python\.h")


def leave_alone(function: Function) -> Function:
    return function


def compile_whole(builder: Builder) -> Compilable:
    """Wraps a builder whose whole call can be compiled."""
    return lambda case, o, wrap: wrap(builder(case, o))


def compile_call(builder: Compilable, case: Case, o: Operands) -> Call:
    """Returns ``builder``'s call, with what it passes through its third argument compiled.

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


def compile_module(module: nn.Module, device: str) -> Any:
    """Compiles the module as its user would, by its first call.

    Modules of one kind and shape share a compilation. ``Absent`` where there would be no compiler.
    """
    if device == "cuda" and find_spec("triton") is None:
        raise Absent("torch.compile needs triton on a GPU")
    if not any(shutil.which(name) for name in (os.environ.get("CXX", ""), "g++", "clang++")):
        raise Absent("torch.compile needs a C++ compiler: none in CXX, no g++, no clang++")
    return torch.compile(module)


def _compile(case: Case, function: Function) -> Function:
    """Compiles a function, whose operands lie in its closure, as arguments of the compiled code."""
    assert isinstance(function, FunctionType)
    code = _code_for(function.__code__, case.device, case.name)
    same = FunctionType(code, function.__globals__, closure=function.__closure__)
    return torch.compile(same, fullgraph=True, dynamic=False)


@cache
def _code_for(code: CodeType, *case: str) -> CodeType:
    """Copies the code for a case: a code object's compilations are limited in number."""
    return code.replace()
