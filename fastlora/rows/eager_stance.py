"""A stance in which nothing compiled runs, for the ops of compiled code cannot be seen."""

from __future__ import annotations

import sys
import threading
from typing import Any

import torch

_lock = threading.Lock()
_holders = 0
_stance: Any = None


class EagerStance:
    """A span in which nothing compiled runs, in any thread.

    From ``begin`` to ``end``, each of which is called once at most.
    """

    def __init__(self) -> None:
        self._on = False

    def begin(self) -> None:
        """Does nothing where nobody has compiled anything, or within compiled code."""
        global _holders, _stance
        if self._on or "torch._dynamo" not in sys.modules:
            return
        with _lock:
            if not _holders:
                try:
                    _stance = torch.compiler.set_stance("force_eager")
                except RuntimeError:  # within a compiled call
                    return
            _holders += 1
            self._on = True

    def end(self) -> None:
        global _holders, _stance
        if not self._on:
            return
        with _lock:
            self._on = False
            _holders -= 1
            if not _holders:
                _stance.__exit__(None, None, None)
                _stance = None
