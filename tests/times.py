"""What a run took, in its last lines: who adds tests sees what they cost."""

from __future__ import annotations

import os
import time
from collections import Counter

import pytest

STARTED = pytest.StashKey[float]()
# How many seconds a run may take; unset, nothing is said.
ALLOWED = "FASTLORA_TEST_SECONDS"


def start(config: pytest.Config) -> None:
    config.stash[STARTED] = time.monotonic()


def tell(reporter: pytest.TerminalReporter) -> None:
    if ALLOWED in os.environ:
        taken = time.monotonic() - reporter.config.stash[STARTED]
        reports = [r for some in reporter.stats.values() for r in some]
        reporter.write_line(line(reports, taken, float(os.environ[ALLOWED])))


def line(reports: list, taken: float, allowed: float) -> str:
    """Of the reports of setups, calls and teardowns, which may be other workers'."""
    files: Counter[str] = Counter()
    tests, workers = set(), set()
    for report in reports:
        if isinstance(report, pytest.TestReport):
            tests.add(report.nodeid)
            workers.add(getattr(report, "worker_id", ""))
            files[report.nodeid.partition("::")[0]] += report.duration
    slowest = ", ".join(f"{file} {seconds:.0f} s" for file, seconds in files.most_common(5))
    over = "" if taken <= allowed else "TOO LONG: "
    return (
        f"{over}{len(tests):,} tests took {taken:.0f} s of {allowed:.0f} s allowed "
        f"({files.total():.0f} s of tests, {len(workers)} at a time). The slowest files: {slowest}"
    )
