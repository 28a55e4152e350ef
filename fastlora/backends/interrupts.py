"""Ctrl-C that waits until what it would break is whole, or can be undone.

Python raises KeyboardInterrupt between any two steps: after a kernel has written a weight, say, and
before anybody has noted it.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch

_pending: list[tuple[int, FrameType | None]] = []
# What was to be called; within deferred() in the main thread, where alone signals arrive.
_handler: Callable[[int, FrameType | None], Any] | None = None


@contextmanager
def deferred() -> Iterator[None]:
    """SIGINT waits for ``check``, or for the end."""
    global _handler
    # torch.compile cannot trace what follows, and breaks its graph before the merge anyway.
    ours = not torch.compiler.is_compiling() and _in_main_thread() and _handler is None
    handler = signal.getsignal(signal.SIGINT) if ours else None
    if not callable(handler):
        yield
        return
    _handler = handler
    signal.signal(signal.SIGINT, lambda number, frame: _pending.append((number, frame)))
    try:
        yield
    finally:
        _handler = None
        signal.signal(signal.SIGINT, handler)
        # One that came after the last check: all is done, and the caller hears of it now.
        if _pending:
            handler(*_taken())


def check() -> None:
    """Where a SIGINT that has arrived may raise."""
    if _pending and _handler is not None and _in_main_thread():
        _handler(*_taken())


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _taken() -> tuple[int, FrameType | None]:
    first = _pending[0]
    _pending.clear()
    return first
