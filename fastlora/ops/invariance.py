"""``batch_invariant``: a row's output has the same bits whatever other rows its batch has.

Asked for around a call, it travels as a mark on the backend's name, an argument of the op, so that
compiled graphs keep it. Library products choose their tiles by the number of rows, so those are not
used: each backend has a way of its own, and says in docs/support.md what it costs.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_MARK = "+invariant"


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

    Of LoRA layers the whole output, of everything else nothing: attention, norms and other linears
    of a model are not this library's. Backward passes are as ever; a dropout mask follows a row's
    place. Compiled functions are traced again for it, and also when another thread is within.
    What it costs: docs/support.md.
    """
    _entered(1)
    try:
        yield
    finally:
        _entered(-1)


def _entered(change: int) -> None:
    global _open, _anywhere
    _asked.depth += change
    with _lock:
        _open += change
        _anywhere = _open > 0


def asked() -> bool:
    """Whether this thread is within ``batch_invariant``."""
    return _anywhere if torch.compiler.is_compiling() else _asked.depth > 0


def marked(backend: str) -> str:
    """The backend's name as a call within ``batch_invariant`` hands it on."""
    return backend + _MARK if asked() else backend


def unmarked(backend: str) -> tuple[str, bool]:
    """The backend's own name, and whether its way is to be the invariant one."""
    name, mark, _ = backend.partition(_MARK)
    return name, bool(mark)
