"""Judging of a run whose gates have passed: by earlier lines, and by the run's fastest peers.

A single measurement may have been disturbed. What seems too slow is measured again, and counts
where every measurement says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness import runner
from benchmarks.harness.case import Case
from benchmarks.harness.lines import Line
from benchmarks.harness.terminal import Screen
from benchmarks.reports import compare, peer_limit

# How often what seems too slow is measured again before it is believed.
RETRIES = 2

# Cases, and providers of ours that took too long in them.
Slow = set[tuple[str, str]]


@dataclass(frozen=True)
class Run:
    """Measured cases, and the settings to measure some of them again."""

    cases: Sequence[Case]
    folder: Path
    options: Sequence[str]
    timeout: float
    shown: Screen

    def read_lines(self, names: set[str] | None = None) -> list[Line]:
        chosen = (case for case in self.cases if names is None or case.name in names)
        return [line for case in chosen for line in runner.read_lines(case, self.folder)]

    def repeat(self, names: set[str]) -> bool:
        """Measures these cases again; returns whether all are good."""
        chosen = [case for case in self.cases if case.name in names]
        return runner.run(chosen, self.folder, self.options, self.timeout, self.shown)


def judge_by_earlier(run: Run, earlier: Sequence[Line], *, tolerate: bool) -> bool:
    """Returns whether nothing of ours is slower than it was. tolerate: shown, but no failure."""
    changes = compare.list_changes(run.read_lines(), earlier)
    run.shown.say("\nbeside earlier results")
    run.shown.table(*compare.make_table(changes))
    if not any(change.judged for change in changes):
        run.shown.say(compare.NOTHING)

    def find_slower(lines: Sequence[Line]) -> Slow:
        changes = compare.list_changes(lines, earlier)
        return {(change.case, change.provider) for change in changes if change.slower}

    return tolerate or _recovers(run, find_slower, "slower")


def judge_by_peers(run: Run, most: float) -> bool:
    """Returns whether ours is there and takes at most ``most`` times the fastest peer's time."""
    lines = run.read_lines()
    run.shown.say("\nbeside the fastest peer of this run that does the same work")
    run.shown.table(*peer_limit.make_table(peer_limit.pair_with_fastest(lines), most))
    for pair, known in peer_limit.list_excused(lines):
        run.shown.say(
            f"not judged: {pair.ours['case']}: {pair.ours['provider']} takes "
            f"{peer_limit.compute_times(pair):.2f} times as long as {pair.other['provider']}: "
            f"{known.why} ({known.measured})"
        )
    absent = peer_limit.list_missing({case.name: case.providers for case in run.cases}, lines)
    for each in absent:
        run.shown.say(f"ours is missing: {each}")

    def find_slower(lines: Sequence[Line]) -> Slow:
        pairs = (
            pair
            for pair in peer_limit.pair_with_fastest(lines)
            if peer_limit.compute_times(pair) > most
        )
        return {(pair.ours["case"], pair.ours["provider"]) for pair in pairs}

    return _recovers(run, find_slower, f"over {most:g} times the fastest peer") and not absent


def _recovers(run: Run, slow: Callable[[Sequence[Line]], Slow], what: str) -> bool:
    """Whether nothing stays slow each time that it is measured."""
    still_slow = slow(run.read_lines())
    for _ in range(RETRIES):
        if not still_slow:
            return True
        names = {case for case, _ in still_slow}
        run.shown.say(f"{what}, measured again: {', '.join(sorted(names))}")
        if not run.repeat(names):
            return False
        still_slow &= slow(run.read_lines(names))
    for case, provider in sorted(still_slow):
        run.shown.say(f"{what} each of {RETRIES + 1} times: {case}: {provider}")
    return not still_slow
