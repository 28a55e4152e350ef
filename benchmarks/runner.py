"""Every case in a process of its own, watched: a crash or a hang costs that case alone.

The process appends its lines to the results file as they come; what happened to a process that did
not live to the end becomes a line too.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks import table
from benchmarks.one import Line, identity, write
from benchmarks.work import Case

ROOT = Path(__file__).parent.parent
GOOD = ("ok", "absent")


def run(cases: Sequence[Case], folder: Path, options: Sequence[str], timeout: float) -> bool:
    """Measures the cases into ``folder``/<suite>.jsonl; whether every one of them is good.

    options: of the command line, passed on to the process of each case.
    """
    folder.mkdir(parents=True, exist_ok=True)
    good = True
    for number, case in enumerate(cases, 1):
        file = (folder / f"{case.suite}.jsonl").resolve()
        command = [sys.executable, "-m", "benchmarks", "--device", case.device, *options]
        command += ["--one", case.name, "--out", str(file)]
        print(f"\n[{number}/{len(cases)}] {case.name}", flush=True)
        lines = run_one(case, command, file, timeout)
        print(table.rows(lines), flush=True)
        good &= all(line["status"] in GOOD for line in lines)
    return good


def run_one(case: Case, command: Sequence[str], file: Path, timeout: float) -> list[Line]:
    """The case's lines in ``file``, earlier ones replaced, after ``command`` has measured it."""
    _forget(case, file)
    ended = _watch(command, timeout)
    if ended is not None or not _lines(case, file):
        status, reason = ended or ("crashed", "it ended without a result")
        write({**identity(case), "provider": None, "status": status, "reason": reason}, file)
    return _lines(case, file)


def _watch(command: Sequence[str], timeout: float) -> tuple[str, str] | None:
    """How the process failed, or None. It and all that it started are gone on return."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True
        )
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            return "timeout", f"killed after {timeout:g} s"
        finally:
            _end(process)
        if code == 0:
            return None
        log.seek(0)
        said = log.read().decode(errors="replace").strip().splitlines() or ["it said nothing"]
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return "crashed", f"{how}: {said[-1]}"


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
