"""What runs behind each op: the function of the backend that its last argument names.

Where that backend refuses a call, the next one runs it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch

from fastlora.backends.values import Adapters, Rows
from fastlora.ops import dispatch
from fastlora.ops.table import OPS, Op

# Backends that do not take every call of the ops that they have.
_REFUSING = ("cuda",)
_NO_OPTIONS: dict[str, Any] = {}
_INVARIANT: dict[str, Any] = {"invariant": True}
_make = tuple.__new__
# For every thread: backward runs in one of autograd's.
_strict = False


class Refused(RuntimeError):
    """A call that its backend does not take, where no other may run it."""


@contextmanager
def strictly() -> Iterator[None]:
    """Raise ``Refused`` where another backend would run a call: to measure one alone."""
    global _strict
    before, _strict = _strict, True
    try:
        yield
    finally:
        _strict = before


def run(op: str, backend: str, operands: Sequence[Any], options: dict[str, Any]) -> Any:
    """Runs an op on the backend, or on the next one where that refuses the call."""
    package = dispatch.package(backend)
    arguments = pack(op, operands) if op in _ADAPTERS_AT else operands
    if backend not in _REFUSING:
        return getattr(package, op)(*arguments, **options)
    reason = package.refuses(op, arguments, **options)
    if reason is not None and _strict:
        raise Refused(f"the {backend.upper()} kernels do not take {op}: {reason}")
    if reason is not None:
        dispatch.log_once(
            f"{op} runs on another backend than the {backend.upper()} kernels: {reason}"
        )
        return run(op, _next_backend(op, backend, operands), operands, options)
    if op not in package.GRADIENTS:
        return getattr(package, op)(*arguments, **options)

    def others(*arguments: Any) -> list[torch.Tensor]:
        return dispatch.implementation(op, _next_backend(op, backend, operands))(*arguments)

    return run_gradients(op, package, others, arguments, **options)


def run_gradients(
    op: str,
    package: ModuleType,
    others: Callable[..., Any],
    arguments: Sequence[Any],
    **options: Any,
) -> list[torch.Tensor]:
    """Gradients from a package that has only the first of them; from ``others`` those it lacks."""
    *arguments, needs = arguments
    pairs = list(zip(needs, package.GRADIENTS[op], strict=True))
    here, there = ([need and has is side for need, has in pairs] for side in (True, False))
    grads = getattr(package, op)(*arguments, here, **options) if any(here) else []
    return grads + others(*arguments, there) if any(there) else grads


# Where the adapters' operands begin in the ops of many adapters; the six of the rows follow them,
# in backward h between the two.
_ADAPTERS_AT = {
    name: op.names.index("lora_A") for name, op in OPS.items() if op.kind in ("multi", "packed")
}


def pack(op: str, operands: Sequence[Any]) -> Sequence[Any]:
    """Packs an op's flat operands as backends take them: one ``Adapters``, one ``Rows``."""
    at = _ADAPTERS_AT.get(op)
    if at is None:
        return operands
    if op == "multi_lora_linear_backward":
        dy, x, weight, lora_A, lora_B, h, *rows, needs = operands
        return dy, x, weight, Adapters(lora_A, lora_B), h, Rows(*rows), needs
    # Made as tuples are: the constructors of the two take half a microsecond of a decode step.
    adapters = operands[at:-6] if len(operands) - at > 8 else (*operands[at:-6], None, ())
    return *operands[:at], _make(Adapters, adapters), _make(Rows, operands[-6:])


def _next_backend(op: str, backend: str, operands: Sequence[Any]) -> str:
    x, lora_A = (operands[OPS[op].names.index(name)] for name in ("x", "lora_A"))
    return dispatch.next_backend(op, backend, x, lora_A)


def _implement(op: Op) -> Callable[..., Any]:
    name, has_invariant = op.name, op.independent_rows

    def run_op(*args: Any) -> Any:
        backend, options = args[-1], _NO_OPTIONS
        if has_invariant:
            options, operands = _INVARIANT if args[-2] else _NO_OPTIONS, args[:-2]
        else:
            operands = args[:-1]
        if torch._C._is_any_autocast_enabled():
            first = operands[0][0] if isinstance(operands[0], list) else operands[0]
            device = first.device.type
            # The caller has cast what autocast wants cast; inside, dtypes are as written.
            with torch.autocast(device, enabled=False):
                return run(name, backend, operands, options)
        return run(name, backend, operands, options)

    def run_as_written(*args: Any) -> Any:
        # After a graph break torch.compile compiles the frames in here too, and would contract
        # what must be exact. Without it loaded, asking it not to would load it: seconds.
        loaded = "torch._dynamo" in sys.modules
        return torch.compiler.disable(run_op)(*args) if loaded else run_op(*args)

    return run_as_written if op.kind == "merge" else run_op


# By the ops' names; of all arguments, as the schemas have them.
IMPLEMENTATIONS = {op.name: _implement(op) for op in OPS.values()}
