"""Forwards that go the same way each time that they are given the same kinds of inputs.

That is taken for granted of torch's and transformers' modules. Any other class may keep a state
anywhere, or ask a clock: it is followed each time. Before such a class is compiled, its attributes
and what its code can be seen to do decide.
"""

from __future__ import annotations

import dis
from functools import cache
from types import CodeType, FunctionType
from typing import Any

from torch import Tensor, nn

_TRUSTED = ("torch", "transformers", "peft", "fastlora", "timm", "diffusers", "accelerate")
_WRITES = ("STORE_ATTR", "DELETE_ATTR", "STORE_GLOBAL", "DELETE_GLOBAL")
# What gives another value each time, or changes something in place.
_UNREPEATABLE = {
    "random", "randint", "shuffle", "choice", "time", "perf_counter", "monotonic", "next", "pop",
    "append", "setattr", "setdefault", "update", "popleft", "insert", "extend", "environ", "getenv",
}  # fmt: skip
_MODULE_ATTRIBUTES = frozenset(vars(nn.Module()))
_SIMPLE = (bool, int, float, str, bytes, type(None))


def read_state(model: nn.Module) -> tuple[Any, ...] | None:
    """Reads what a forward depends on besides its inputs; None where more than that can be."""
    states: list[Any] = []
    for module in model.modules():
        kind = type(module)
        if _is_trusted_class(kind):
            continue
        if not _is_stateless(kind):
            return None
        attributes = vars(module).items()
        states.append(
            tuple((k, _simplify(v)) for k, v in attributes if k not in _MODULE_ATTRIBUTES)
        )
    return tuple(states)


def has_foreign_hooks(model: nn.Module) -> bool:
    """Whether other libraries' hooks or forwards may change what a forward does."""
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            if hooks and not all(map(_is_trusted_hook, hooks.values())):
                return True
        forward = module.__dict__.get("forward")
        if forward is not None and not _is_trusted_hook(forward):
            return True
    return False


def _is_trusted_hook(hook: Any) -> bool:
    hook = getattr(hook, "func", hook)
    name = getattr(hook, "__module__", None) or type(hook).__module__
    return str(name).partition(".")[0] in _TRUSTED


def is_all_trusted(model: nn.Module) -> bool:
    return all(_is_trusted_class(type(module)) for module in model.modules())


@cache
def _is_trusted_class(kind: type) -> bool:
    return kind.__module__.partition(".")[0] in _TRUSTED


@cache
def _is_stateless(kind: type) -> bool:
    """Whether a class's forward, and its methods that this names, write nothing."""
    checked: set[str] = set()
    pending = {"forward"}
    while pending:
        name = pending.pop()
        checked.add(name)
        owner = next((base for base in kind.__mro__ if name in vars(base)), None)
        if owner is None or _is_trusted_class(owner):
            continue
        value = vars(owner)[name]
        value = getattr(value, "__func__", getattr(value, "fget", value))
        function = getattr(value, "__wrapped__", value)
        if not isinstance(function, FunctionType):
            continue
        names = _collect_names(function.__code__)
        if names is None or names & _UNREPEATABLE:
            return False
        values = (function.__globals__.get(name) for name in names)
        if any(isinstance(value, (list, dict, set, Tensor, nn.Module)) for value in values):
            return False
        pending |= {each for each in names if hasattr(kind, each)} - checked
    return True


def _collect_names(code: CodeType) -> set[str] | None:
    """Collects the names that code uses; None where it writes to what outlives it."""
    names = set(code.co_names)
    for step in dis.get_instructions(code):
        if step.opname in _WRITES:
            return None
        if step.opname == "STORE_DEREF" and step.argval in code.co_freevars:
            return None
    for part in code.co_consts:
        if isinstance(part, CodeType):
            inner = _collect_names(part)
            if inner is None:
                return None
            names |= inner
    return names


def _simplify(value: Any) -> Any:
    if isinstance(value, _SIMPLE):
        return value
    if isinstance(value, (list, tuple)):
        return tuple(map(_simplify, value))
    if isinstance(value, dict):
        return tuple((str(key), _simplify(part)) for key, part in value.items())
    return type(value), id(value)
