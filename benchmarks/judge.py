"""What a run is judged by when its gates have passed: earlier lines, and the run's fastest peers.

A single measurement may have been disturbed. What seems too slow is measured again, and counts
where every measurement says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness import runner
from benchmarks.harness.lines import Line
from benchmarks.harness.screen import Screen
from benchmarks.harness.work import Case
from benchmarks.reports import bound, compare

# How often what seems too slow is measured again before it is believed.
RETRIES = 2

# Of a case, the providers of ours that took too long.
Slow = set[tuple[str, str]]


@dataclass(frozen=True)
class Run:
    """Cases that were measured, and with what to measure some of them again."""

    cases: Sequence[Case]
    folder: Path
    options: Sequence[str]
    timeout: float
    shown: Screen

    def lines(self, names: set[str] | None = None) -> list[Line]:
        chosen = (case for case in self.cases if names is None or case.name in names)
        return [line for case in chosen for line in runner.lines_of(case, self.folder)]

    def again(self, names: set[str]) -> bool:
        """Whether all that was measured is good."""
        chosen = [case for case in self.cases if case.name in names]
        return runner.run(chosen, self.folder, self.options, self.timeout, self.shown)


def beside_earlier(run: Run, earlier: Sequence[Line], *, tolerate: bool) -> bool:
    """Whether nothing of ours is slower than it was. tolerate: it is shown, and no failure."""
    changes = compare.changes(run.lines(), earlier)
    run.shown.say("\nbeside earlier results")
    run.shown.table(*compare.table(changes))
    if not any(change.judged for change in changes):
        run.shown.say(compare.NOTHING)

    def slower(found: Sequence[Line]) -> Slow:
        said = compare.changes(found, earlier)
        return {(change.case, change.provider) for change in said if change.slower}

    return tolerate or _recovers(run, slower, "slower")


def beside_peers(run: Run, most: float) -> bool:
    """Whether ours is there, and takes no more than so many times the fastest peer's time."""
    found = run.lines()
    run.shown.say("\nbeside the fastest peer of this run that does the same work")
    run.shown.table(*bound.table(bound.pairs(found), most))
    for pair, known in bound.excused(found):
        run.shown.say(
            f"not judged: {pair.ours['case']}: {pair.ours['provider']} takes "
            f"{bound.times(pair):.2f} times as long as {pair.other['provider']}: "
            f"{known.why} ({known.measured})"
        )
    absent = bound.missing({case.name: case.providers for case in run.cases}, found)
    for each in absent:
        run.shown.say(f"ours is missing: {each}")

    def over(found: Sequence[Line]) -> Slow:
        pairs = (pair for pair in bound.pairs(found) if bound.times(pair) > most)
        return {(pair.ours["case"], pair.ours["provider"]) for pair in pairs}

    return _recovers(run, over, f"over {most:g} times the fastest peer") and not absent


def _recovers(run: Run, slow: Callable[[Sequence[Line]], Slow], what: str) -> bool:
    """Whether nothing is slow each time that it is measured."""
    left = slow(run.lines())
    for _ in range(RETRIES):
        if not left:
            return True
        names = {case for case, _ in left}
        run.shown.say(f"{what}, measured again: {', '.join(sorted(names))}")
        if not run.again(names):
            return False
        left &= slow(run.lines(names))
    for case, provider in sorted(left):
        run.shown.say(f"{what} each of {RETRIES + 1} times: {case}: {provider}")
    return not left
