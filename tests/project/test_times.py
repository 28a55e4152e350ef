"""The line about the duration of a test run warns when it took too long."""

import pytest

from tests.times import line


def report(file: str, test: str, when: str, seconds: float, worker: str) -> pytest.TestReport:
    nodeid = f"tests/{file}::{test}"
    given = {"keywords": {}, "outcome": "passed", "longrepr": None, "duration": seconds}
    made = pytest.TestReport(nodeid, (file, 1, test), when=when, **given)
    made.worker_id = worker
    return made


REPORTS = [
    report("test_a.py", "test_one", "setup", 1.0, "gw0"),
    report("test_a.py", "test_one", "call", 2.0, "gw0"),
    report("test_b.py", "test_two", "call", 30.0, "gw1"),
    object(),  # a warning, say
]


def test_times_line_gives_duration_and_slowest_files():
    assert line(REPORTS, 21.4, 60) == (
        "2 tests took 21 s of 60 s allowed (33 s of tests, 2 at a time). "
        "The slowest files: tests/test_b.py 30 s, tests/test_a.py 3 s"
    )


def test_times_line_warns_first_when_too_long():
    assert line(REPORTS, 60.0, 60).startswith("2 tests")
    assert line(REPORTS, 61.0, 60).startswith("TOO LONG: 2 tests took 61 s of 60 s allowed")


def test_times_line_accepts_run_without_tests():
    assert line([], 0.0, 60).startswith("0 tests took 0 s of 60 s allowed (0 s of tests")
