"""The only place that chooses a backend.

A backend is a package with one function per op of ``fastlora/ops/table.py`` that it implements,
under the op's name. ``choose`` names the backend for a call, ``implementation`` finds its function,
and ``next_backend`` names who runs a call that the package's own ``refuses`` has a reason against.
The choice travels as an argument of the op, so that a backward runs on its forward's backend and a
compiled graph keeps the one it was traced with.

Unasked, kernels run on a GPU only where they were verified: rows of (op, dtype, arch, path), which
ship with the library or were made by ``fastlora check``. Asking for a backend by name overrides.
"""

from __future__ import annotations

import importlib
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch

from fastlora.ops import availability
from fastlora.ops.availability import BACKENDS, capability, check_name, constant
from fastlora.ops.table import OPS

_MODULES = {name: f"fastlora.backends.{name}" for name in BACKENDS}
_log = logging.getLogger("fastlora")


class _Asked(threading.local):
    # What use_backend asked for in this thread, else FASTLORA_BACKEND as the process started.
    name: str | None = os.environ.get("FASTLORA_BACKEND") or None


_asked = _Asked()
# The last name any thread asked for: what torch.compile traces with, since it guards on globals
# but, in torch 2.10, reads a thread-local's class instead.
_latest = _Asked.name
_loaded: dict[str, ModuleType] = {}
_on_cpu: dict[tuple[Any, ...], str] = {}
_logged: set[str] = set()


def choose(
    op: str,
    device: torch.device,
    dtype: torch.dtype | None = None,
    lora_dtype: torch.dtype | None = None,
    rank: int = 0,
) -> str:
    """The backend that runs such a call of ``op``: the one asked for, else the best verified one.

    Raises RuntimeError when the one asked for has the op but cannot run the call.
    """
    compiling = torch.compiler.is_compiling()
    asked = _latest if compiling else _asked.name
    if compiling or asked is not None or device.type != "cpu":
        return _choose(op, asked, device, dtype, lora_dtype, rank)
    # Where nothing but these decides, once: small layers would feel it.
    call = op, dtype, lora_dtype
    chosen = _on_cpu.get(call)
    if chosen is None:
        chosen = _on_cpu[call] = _choose(op, None, device, dtype, lora_dtype, rank)
    return chosen


def _choose(
    op: str,
    asked: str | None,
    device: torch.device,
    dtype: torch.dtype | None,
    lora_dtype: torch.dtype | None,
    rank: int,
) -> str:
    if asked is not None and check_name(asked) in _backends_of(op):
        reason = availability.cannot(asked, device, dtype, lora_dtype, rank)
        if reason is not None:
            raise RuntimeError(f"backend {asked!r} was asked for but cannot run {op}: {reason}")
        return asked
    if asked is not None:
        log_once(f"backend {asked!r} was asked for but has no {op}, which another one runs")
    for name in _backends_of(op):
        if _best(name, op, device, dtype, lora_dtype, rank):
            return name
    raise RuntimeError(f"no backend can run {op} on {device}")


def _backends_of(op: str) -> tuple[str, ...]:
    """The backends that have the op, best first; one that is no op is for those that have all."""
    return OPS[op].backends if op in OPS else ("cpu", "torch")


def _backward_of(op: str) -> str:
    """The op without which this one is not used: what runs forward must run backward."""
    return (OPS[op].backward if op in OPS else None) or op


def _best(
    backend: str,
    op: str,
    device: torch.device,
    dtype: torch.dtype | None,
    lora_dtype: torch.dtype | None,
    rank: int,
) -> bool:
    """Whether ``backend`` may run the call unasked."""
    if backend not in ("cuda", "triton"):
        return availability.cannot(backend, device, dtype, lora_dtype, rank) is None
    if device.type != "cuda":
        return False
    if availability.unusable(backend) is not None or availability.no_gpu() is not None:
        return False
    reason = availability.cannot(backend, device, dtype, lora_dtype, rank)
    if reason is None and backend == "cuda":
        return _verified_cuda(op, device, dtype, lora_dtype)
    if reason is None:
        return bool(verified_paths(op, device, dtype, lora_dtype))
    if backend == "triton" and verified_paths(op, device):
        log_once(f"{op} runs unfused: {reason}")
    return False


@constant
def _verified_cuda(
    op: str, device: torch.device, dtype: torch.dtype | None, lora_dtype: torch.dtype | None
) -> bool:
    """Whether the CUDA kernels of ``op`` passed their tests on this GPU, as did its backward's."""
    paths = importlib.import_module("fastlora.backends.cuda.paths")
    name = None if dtype is None else paths.dtype_name(dtype, lora_dtype)
    major, minor = capability(device)
    backward = _backward_of(op)
    both = {op, backward if "cuda" in _backends_of(backward) else op}
    return all(paths.verified(each, name, 10 * major + minor) for each in both)


@constant
def verified_paths(
    op: str,
    device: torch.device,
    dtype: torch.dtype | None = None,
    lora_dtype: torch.dtype | None = None,
) -> tuple[str, ...]:
    """The Triton paths of ``op`` that passed their tests on this GPU, as did the op's backward.

    Without a dtype: of any.
    """
    choice = importlib.import_module("fastlora.kernels.choose.choice")
    arch = importlib.import_module("fastlora.kernels.tile.launch").arch_of(device)
    name = None if dtype is None else choice.dtype_name(dtype, lora_dtype or dtype)
    backward = choice.verified(_backward_of(op), name, arch)
    return choice.verified(op, name, arch) if backward else ()


def package(backend: str) -> ModuleType:
    """The package that holds the functions of ``backend``, by the names of its ops."""
    module = _loaded.get(backend)
    if module is None:
        module = _loaded[backend] = importlib.import_module(_MODULES[check_name(backend)])
    return module


def implementation(op: str, backend: str) -> Any:
    """The function of ``backend`` for ``op``."""
    return getattr(package(backend), op)


def next_backend(op: str, backend: str, x: torch.Tensor, lora_A: torch.Tensor) -> str:
    """The best backend after ``backend`` for a call of ``op`` with these operands."""
    call = (op, x.device, x.dtype, lora_A.dtype, lora_A.shape[-2])
    after = BACKENDS[BACKENDS.index(backend) + 1 :]
    return next(name for name in after if name in _backends_of(op) and _best(name, *call))


def merge_kernel(backend: str, device: torch.device) -> str:
    """The name of the arithmetic that ``merge_`` has on ``backend``, which its receipts bear."""
    return implementation("merge_kernel", backend)(device)


def backend(op: str | None = None, device: torch.device | str | None = None) -> str:
    """The name of the backend that runs ``op`` (default: lora_linear) on ``device`` (default: CPU).

    One of ``"cuda"``, ``"triton"``, ``"cpu"``, ``"torch"``. Raises RuntimeError when a backend was
    asked for by name and cannot run here.
    """
    return choose(op or "lora_linear", torch.device(device or "cpu"))


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run this thread's ops on the backend ``name``; ``FASTLORA_BACKEND`` does so for a process.

    Compiled functions are traced again for another choice, and follow the last one of any thread.

    Raises ValueError for an unknown name, RuntimeError with the reason for one that cannot run.
    """
    reason = availability.unusable(name)
    if reason is not None:
        raise RuntimeError(f"backend {name!r} cannot be used: {reason}")
    global _latest
    before, _asked.name = _asked.name, name
    _latest = name
    try:
        yield
    finally:
        _asked.name = _latest = before


def asked() -> str | None:
    """The backend that this thread has asked for by name."""
    return _asked.name


@contextmanager
def quietly() -> Iterator[None]:
    """Log nothing in here: what is asked is not run."""
    before = _log.disabled
    _log.disabled = True
    try:
        yield
    finally:
        _log.disabled = before


def log_once(text: str) -> None:
    """Warns, the first time in this process."""
    if torch.compiler.is_compiling() or _log.disabled:
        return
    if text not in _logged:
        _logged.add(text)
        _log.warning(text)
