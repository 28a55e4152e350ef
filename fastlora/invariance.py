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
# How deep any thread went last: what torch.compile traces with, as in ``dispatch``.
_latest = 0


@contextmanager
def batch_invariant() -> Iterator[None]:
    """This thread's forward passes give every row the bits that it would have alone.

    Of LoRA layers the whole output, of everything else nothing: attention, norms and other linears
    of a model are not this library's. Backward passes are as ever. Costs are in docs/support.md.
    """
    global _latest
    _asked.depth += 1
    _latest = _asked.depth
    try:
        yield
    finally:
        _asked.depth -= 1
        _latest = _asked.depth


def asked() -> bool:
    """Whether this thread is within ``batch_invariant``."""
    return (_latest if torch.compiler.is_compiling() else _asked.depth) > 0


def marked(backend: str) -> str:
    """The backend's name as a call within ``batch_invariant`` hands it on."""
    return backend + _MARK if asked() else backend


def unmarked(backend: str) -> tuple[str, bool]:
    """The backend's own name, and whether its way is to be the invariant one."""
    name, mark, _ = backend.partition(_MARK)
    return name, bool(mark)
