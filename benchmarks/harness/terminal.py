"""Terminal output while cases run: tables and a progress bar with rich, plain lines without it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Protocol

from benchmarks.harness import table
from benchmarks.harness.lines import Line


class Screen(Protocol):
    """Context manager; ``total`` cases are announced one by one and shown when measured."""

    def __enter__(self) -> Screen: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...

    def begin(self, name: str) -> None:
        """Announces a case."""

    def case(self, name: str, lines: Sequence[Line]) -> None:
        """Shows one case's lines, and counts it."""

    def table(self, heading: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Shows any table: names in the first column, figures in the others."""

    def say(self, text: str) -> None: ...


def open_screen(total: int) -> Screen:
    """Opens the screen that suits this terminal, for ``total`` cases."""
    if not sys.stdout.isatty():
        return Plain(total)  # a log, or a pipe
    try:
        return Rich(total)
    except ImportError:
        return Plain(total)


class Plain:
    """Screen of plain lines, for logs and pipes."""

    def __init__(self, total: int) -> None:
        self._total, self._number = total, 0

    def __enter__(self) -> Plain:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def begin(self, name: str) -> None:
        pass

    def case(self, name: str, lines: Sequence[Line]) -> None:
        self._number += 1
        self.say(f"\n[{self._number}/{self._total}] {name}")
        self.table(table.HEADING, table.make_rows(lines))
        for note in table.make_notes(lines):
            self.say(f"  {note}")

    def table(self, heading: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        if rows:
            self.say(table.format_plain(heading, rows))

    def say(self, text: str) -> None:
        print(text, flush=True)


class Rich:
    """Screen with a progress bar."""

    def __init__(self, total: int) -> None:
        """Raises ImportError where rich is not installed."""
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("of about"),
            TimeRemainingColumn(),
            console=Console(highlight=False),
            transient=True,
        )
        self._task = self._progress.add_task("", total=total)

    def __enter__(self) -> Rich:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def begin(self, name: str) -> None:
        self._progress.update(self._task, description=name)

    def case(self, name: str, lines: Sequence[Line]) -> None:
        self.table(table.HEADING, table.make_rows(lines), title=name)
        for note in table.make_notes(lines):
            self.say(note)
        self._progress.advance(self._task)

    def table(
        self, heading: Sequence[str], rows: Sequence[Sequence[str]], title: str | None = None
    ) -> None:
        from rich.markup import escape
        from rich.table import Table

        self._progress.print()
        if title:
            self._progress.print(f"[bold]{escape(title)}[/bold]")
        if not rows:
            return
        shown = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
        for i, column in enumerate(heading):
            shown.add_column(escape(column), justify="right" if i else "left")
        for row in rows:
            style: Any = "bold" if row[0].startswith("fastlora") else None
            shown.add_row(*(escape(cell) for cell in row), style=style)
        self._progress.print(shown)

    def say(self, text: str) -> None:
        from rich.markup import escape

        self._progress.print(escape(text))
