"""``batch_invariant``: a row's output has the same bits whatever other rows its batch has.

Asked for around a call, it travels as an argument of the op, so that compiled graphs keep it.
Library products choose their tiles by the number of rows, so those are not used: each backend has a
way of its own, and docs/support.md says what it costs.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class _Asked(threading.local):
    depth = 0


_asked = _Asked()
# Whether any thread is within: what torch.compile traces with, which cannot read a thread's own.
_lock = threading.Lock()
_open = 0
_anywhere = False


@contextmanager
def batch_invariant() -> Iterator[None]:
    """This thread's forward passes give every row the bits that it would have alone.

    The whole output of LoRA layers, nothing else: attention, norms and other linears of a model are
    not this library's. Backward passes are as ever; a dropout mask follows a row's place. Compiled
    functions are traced again for it, and also when another thread is within.
    What it costs: docs/support.md.
    """
    _count(1)
    try:
        yield
    finally:
        _count(-1)


def _count(change: int) -> None:
    global _open, _anywhere
    _asked.depth += change
    with _lock:
        _open += change
        _anywhere = _open > 0


def asked() -> bool:
    """Whether this thread is within ``batch_invariant``."""
    return _anywhere if torch.compiler.is_compiling() else _asked.depth > 0
