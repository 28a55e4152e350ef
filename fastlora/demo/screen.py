"""Terminal output: a progress bar at the bottom, chapters and tables above it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.rule import Rule
from rich.table import Table

from fastlora.demo.claims import Claim

NARROWEST = 100  # a pipe has no width of its own, and tables should not wrap in it


class Screen:
    """Prints the demo; a context manager, in which the progress bar lives."""

    def __init__(self) -> None:
        console = Console(highlight=False)
        if not console.is_terminal:
            console.width = max(console.width, NARROWEST)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(),
            TextColumn("of about"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self._task = self._progress.add_task("", total=None)

    def __enter__(self) -> Screen:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def expect(self, steps: int) -> None:
        """Sets how often ``advance`` will be called altogether."""
        self._progress.update(self._task, total=steps)

    def announce(self, step: str) -> None:
        """Prints beside the bar what runs now."""
        self._progress.update(self._task, description=escape(step))

    def advance(self) -> None:
        """Moves the bar by one training step."""
        self._progress.advance(self._task)

    def chapter(self, title: str) -> None:
        """Prints the heading of a chapter."""
        self._progress.print()
        self._progress.print(Rule(f"[bold]{escape(title)}[/bold]", align="left", style="cyan"))

    def say(self, text: str) -> None:
        """Prints a text."""
        self._progress.print(escape(text))

    def table(self, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """Prints a table: names in the first column, figures in the others."""
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
        for i, column in enumerate(columns):
            table.add_column(escape(column), justify="right" if i else "left")
        for row in rows:
            table.add_row(*map(escape, row))
        self._progress.print(table)

    def show_claims(self, claims: Sequence[Claim]) -> None:
        """Prints every claim with its mark, its figures below."""
        for claim in claims:
            self._progress.print(f"{_choose_mark(claim)} {escape(claim.sentence)}")
            self._progress.print(f"  [dim]{escape(claim.figures)}[/dim]")
        if any(not claim.counts and not claim.holds for claim in claims):
            self.say("· depends on model, text and length of training, and does not count here")


def _choose_mark(claim: Claim) -> str:
    if claim.holds:
        return "[green]✓[/green]"
    return "[bold red]✗[/bold red]" if claim.counts else "[yellow]·[/yellow]"
