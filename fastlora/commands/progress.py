"""Progress of a command: a bar with rich on a terminal, else a line a step."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import TracebackType
from typing import Any


class Progress:
    """Context manager; ``title`` names the command, ``steps`` counts its steps."""

    def __init__(self, title: str, steps: int) -> None:
        self._title, self._steps, self._step = title, steps, 0
        self._bar: Any = None
        if sys.stdout.isatty() and importlib.util.find_spec("rich") is not None:
            self._bar = importlib.import_module("rich.progress").Progress(transient=True)
            self._task = self._bar.add_task(title, total=steps)

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

    def step(self, name: str) -> None:
        """Begins the next step."""
        self._step += 1
        if self._bar is None:
            print(f"{self._title} {self._step}/{self._steps}: {name}", flush=True)
        else:
            self._bar.update(self._task, completed=self._step - 1, description=name)

    def advance_within(self, share: float) -> None:
        """Moves the bar to ``share`` (0 to 1) of the running step; without a bar does nothing."""
        if self._bar is not None:
            self._bar.update(self._task, completed=self._step - 1 + share)

    def say(self, text: str) -> None:
        """Prints a line that stays."""
        if self._bar is None:
            print(text, flush=True)
        else:
            self._bar.print(text, markup=False, highlight=False)
