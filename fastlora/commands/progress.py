"""How far a command is: a bar with rich on a terminal, else a line a step."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import TracebackType
from typing import Any


class Progress:
    def __init__(self, what: str, steps: int) -> None:
        self._what, self._steps, self._done = what, steps, 0
        self._bar: Any = None
        if sys.stdout.isatty() and importlib.util.find_spec("rich") is not None:
            self._bar = importlib.import_module("rich.progress").Progress(transient=True)
            self._task = self._bar.add_task(what, total=steps)

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        if self._bar is not None:
            self._bar.stop()

    def step(self, what: str) -> None:
        """The next step begins."""
        self._done += 1
        if self._bar is None:
            print(f"{self._what} {self._done}/{self._steps}: {what}", flush=True)
        else:
            self._bar.update(self._task, completed=self._done - 1, description=what)

    def within(self, share: float) -> None:
        """How much of the running step is done, 0 to 1; a bar shows it, lines do not."""
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done - 1 + share)

    def say(self, text: str) -> None:
        """A line that stays."""
        if self._bar is None:
            print(text, flush=True)
        else:
            self._bar.print(text, markup=False, highlight=False)
