"""Last step of `make test-latest`: the tests with the newest packages, and what those break.

    .venv-latest/bin/python tools/newest.py requirements.lock [pytest's options]

Prints each package that differs from the lock's, then the failed tests by file, each reason once.
The exit code is pytest's.
"""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from xml.etree import ElementTree

from environment import ROOT, Stop, read_lock
from packaging.requirements import Requirement

REASON = 160  # of an error's first line, so many characters are printed


def list_differing(lock: Path) -> Iterator[tuple[str, str, str]]:
    """Yields package, the lock's version for this Python and platform, the installed version."""
    for name, line in read_lock(lock):
        locked = Requirement(line.split(" #")[0])
        if locked.marker is not None and not locked.marker.evaluate():
            continue
        version = str(locked.specifier).removeprefix("==")
        try:
            here = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            here = "none"
        if here.split("+")[0] != version:
            yield name, version, here


def read_failures(report: Path) -> dict[str, dict[str, list[str]]]:
    """Reads failed tests by file, then by the first line of the error."""
    tests_of: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for case in ElementTree.parse(report).iter("testcase"):
        for kind in ("failure", "error"):
            for fault in case.iter(kind):
                lines = fault.get("message", "").splitlines() or [kind]
                file = case.get("classname", "").replace(".", "/") or "?"
                tests_of[file][lines[0][:REASON]].append(case.get("name", "?"))
    return tests_of


def format_table(rows: Sequence[tuple[str, str, str]]) -> Iterator[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def tell(lock: Path, report: Path) -> None:
    rows = list(list_differing(lock))
    print()
    for line in (
        format_table([("package", "locked", "newest"), *rows]) if rows else ["all as locked"]
    ):
        print(line)
    print()
    broken = read_failures(report) if report.is_file() else {}
    for file, reasons in sorted(broken.items()):
        print(f"{file}.py")
        for reason, tests in reasons.items():
            print(f"  {len(tests)} × {reason}")
            print("\n".join(f"      {test}" for test in tests[:5]))
            print(f"      and {len(tests) - 5} more\n" if len(tests) > 5 else "", end="")
    count = sum(len(tests) for reasons in broken.values() for tests in reasons.values())
    print(f"with the newest packages {count or 'no'} test{'s' * (count != 1)} failed")


def main(arguments: Sequence[str] | None = None) -> int:
    lock, *options = sys.argv[1:] if arguments is None else arguments
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        status = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", *options],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},  # one thread a worker
        ).returncode
        try:
            tell(Path(lock), report)
        except Stop as stop:
            print(f"test-latest: {stop}", file=sys.stderr)
            return 1
    return status


if __name__ == "__main__":
    sys.exit(main())
