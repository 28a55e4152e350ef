"""Cases in processes of their own, watched: a crash or a hang costs that case alone.

A process appends its lines to the results file as they come; what happened to one that did not live
to the end becomes a line too, and the cases after it get another process.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks import table
from benchmarks.one import Line, identity, write
from benchmarks.work import Case

ROOT = Path(__file__).parent.parent
GOOD = ("ok", "absent")


# Cases that share a process on a GPU, where its start and imports take longer than most cases.
_TOGETHER = {"cuda": 8, "cpu": 1}
# What a process says when it is through with a case.
FINISHED = "finished "


def run(cases: Sequence[Case], folder: Path, options: Sequence[str], timeout: float) -> bool:
    """Measures the cases into ``folder``/<suite>.jsonl; whether every one of them is good.

    options: of the command line, passed on to the processes. timeout: seconds for each case.
    """
    folder.mkdir(parents=True, exist_ok=True)
    good, number = True, 0
    while number < len(cases):
        first = cases[number]
        rest = cases[number : number + _TOGETHER[first.device]]
        batch = next(list(group) for _, group in itertools.groupby(rest, key=lambda c: c.suite))
        file = (folder / f"{first.suite}.jsonl").resolve()
        command = [sys.executable, "-m", "benchmarks", "--device", first.device, *options]
        for case in batch:
            command += ["--one", case.name]
        for case, lines in run_some(batch, [*command, "--out", str(file)], file, timeout):
            number += 1
            print(f"\n[{number}/{len(cases)}] {case.name}", flush=True)
            print(table.rows(lines), flush=True)
            good &= all(line["status"] in GOOD for line in lines)
    return good


def run_some(
    batch: Sequence[Case], command: Sequence[str], file: Path, timeout: float
) -> list[tuple[Case, list[Line]]]:
    """The first cases of the batch, as far as ``command`` came, and their lines in ``file``.

    Earlier lines are replaced. One that ended the process has a line that says so, and is the last.
    """
    for case in batch:
        _forget(case, file)
    ended, finished = _watch(command, timeout)
    tried = batch if ended is None else batch[: finished + 1]
    for case in tried:
        if (ended is not None and case is tried[-1]) or not _lines(case, file):
            status, reason = ended or ("crashed", "it ended without a result")
            write({**identity(case), "provider": None, "status": status, "reason": reason}, file)
    return [(case, _lines(case, file)) for case in tried]


def _watch(command: Sequence[str], timeout: float) -> tuple[tuple[str, str] | None, int]:
    """How the process failed, or None, and how many cases it finished before.

    It and all that it started are gone on return.
    """
    with tempfile.NamedTemporaryFile() as log:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True
        )
        finished, since = 0, time.monotonic()
        try:
            while process.poll() is None and time.monotonic() - since < timeout:
                time.sleep(0.05)
                if _said(log.name).count(FINISHED) > finished:
                    finished, since = finished + 1, time.monotonic()
            code = process.poll()
        finally:
            _end(process)
        said = _said(log.name)
        finished = said.count(FINISHED)
    if code is None:
        return ("timeout", f"killed after {timeout:g} s"), finished
    if code == 0:
        return None, finished
    last = (said.strip().splitlines() or ["it said nothing"])[-1]
    how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return ("crashed", f"{how}: {last}"), finished


def _said(log: str) -> str:
    return Path(log).read_text(errors="replace")


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _lines(case: Case, file: Path) -> list[Line]:
    return [line for line in read(file) if line["case"] == case.name]


def read(file: Path) -> list[Line]:
    """The lines of a results file, none where there is no file."""
    if not file.exists():
        return []
    return [json.loads(text) for text in file.read_text().splitlines()]


def _forget(case: Case, file: Path) -> None:
    kept = [line for line in read(file) if line["case"] != case.name]
    if not file.exists():
        return
    new = file.with_suffix(".new")
    new.write_text("".join(json.dumps(line) + "\n" for line in kept))
    os.replace(new, file)
