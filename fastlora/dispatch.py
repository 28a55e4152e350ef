"""The only place that chooses a backend.

A backend is a module with one function per op of ``fastlora/ops.py`` that it implements, under the
op's name. ``choose`` names the backend for an op on a device, ``implementation`` finds its
function. The choice travels as an argument of the op, so that a backward runs on its forward's
backend and a compiled graph keeps the one it was traced with.
"""

from __future__ import annotations

import importlib
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch

# Best first; "torch" implements every op on every device.
BACKENDS = ("cuda", "triton", "cpu", "torch")

_MODULES = {"torch": "fastlora.reference"}
_ABSENT = {
    "cuda": "this version holds no CUDA kernels",
    "triton": "this version holds no Triton LoRA kernels (only the dropout mask's twin)",
    "cpu": "this version holds no native CPU library",
}


class _Asked(threading.local):
    # What use_backend asked for in this thread, else FASTLORA_BACKEND as the process started.
    name: str | None = os.environ.get("FASTLORA_BACKEND") or None


_asked = _Asked()
# The last name any thread asked for: what torch.compile traces with, since it guards on globals
# but, in torch 2.10, reads a thread-local's class instead.
_latest = _Asked.name
_loaded: dict[str, ModuleType] = {}


def unusable(backend: str) -> str | None:
    """Why ``backend`` cannot run here, or None when it can."""
    return _ABSENT.get(_known(backend))


def choose(op: str, device: torch.device) -> str:
    """The backend that runs ``op`` on ``device``: the one asked for, else the best usable one."""
    asked = _latest if torch.compiler.is_compiling() else _asked.name
    if asked is None:
        for name in BACKENDS:
            if unusable(name) is None:
                return name
        raise RuntimeError(f"no backend can run {op} on {device}")
    reason = unusable(asked)
    if reason is not None:
        raise RuntimeError(f"backend {asked!r} was asked for but cannot run {op}: {reason}")
    return asked


def implementation(op: str, backend: str) -> Callable[..., Any]:
    """The function that runs ``op`` on ``backend``."""
    module = _loaded.get(backend)
    if module is None:
        module = _loaded[backend] = importlib.import_module(_MODULES[_known(backend)])
    return getattr(module, op)


def backend(op: str | None = None, device: torch.device | str | None = None) -> str:
    """The name of the backend that runs ``op`` (default: every op) on ``device`` (default: CPU).

    One of ``"cuda"``, ``"triton"``, ``"cpu"``, ``"torch"``. Raises RuntimeError when a backend was
    asked for by name and cannot run here.
    """
    return choose(op or "every op", torch.device(device or "cpu"))


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run this thread's ops on the backend ``name``; ``FASTLORA_BACKEND`` does so for a process.

    Compiled functions are traced again for another choice, and follow the last one of any thread.

    Raises ValueError for an unknown name, RuntimeError with the reason for one that cannot run.
    """
    reason = unusable(name)
    if reason is not None:
        raise RuntimeError(f"backend {name!r} cannot be used: {reason}")
    global _latest
    before, _asked.name = _asked.name, name
    _latest = name
    try:
        yield
    finally:
        _asked.name = _latest = before


def _known(name: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {name!r}")
    return name
