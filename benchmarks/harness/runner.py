"""Cases in processes of their own, watched: a crash or a hang costs that case alone.

A process appends its lines to the results file as they come; what happened to one that did not live
to the end becomes a line too, and the cases after it get another process.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import ROOT
from benchmarks.harness import lines
from benchmarks.harness.lines import Line
from benchmarks.harness.one import identity
from benchmarks.harness.screen import Screen
from benchmarks.harness.work import Case, Ceilings
from benchmarks.reports import flat

GOOD = ("ok", "absent")

# Cases that share a process, whose start and imports take longer than most cases.
_TOGETHER = 8
# What a process says when it is through with a case, and when it leaves the others to nobody.
FINISHED, OUT_OF_TIME = "benchmarks: finished ", "benchmarks: out of time"


def run(
    cases: Sequence[Case],
    folder: Path,
    options: Sequence[str],
    timeout: float,
    shown: Screen,
    deadline: float | None = None,
) -> bool:
    """Measures the cases into ``folder``/<suite>.jsonl; whether every one of them is good.

    options: of the command line, passed on to the processes. timeout: seconds for each case.
    deadline: seconds after which no further case is begun.
    """
    folder.mkdir(parents=True, exist_ok=True)
    good, number, began = True, 0, time.monotonic()
    if cases:
        shown.begin("the device's ceilings")
        options = [*options, "--ceilings", json.dumps(_ceilings(cases, options)._asdict())]
    while number < len(cases):
        left = math.inf if deadline is None else deadline - (time.monotonic() - began)
        if left <= 0:
            shown.say(f"\nout of time: {len(cases) - number} cases were not begun")
            break
        first = cases[number]
        rest = cases[number : number + _TOGETHER]
        batch = next(list(group) for _, group in itertools.groupby(rest, key=lambda c: c.suite))
        shown.begin(first.name)
        file = _file(first, folder)
        command = [sys.executable, "-m", "benchmarks", first.suite, "--device", first.device]
        command += options
        command += ["--deadline", f"{left:.1f}"] if math.isfinite(left) else []
        for case in batch:
            command += ["--one", case.name]
        for case, found in run_some(batch, [*command, "--out", str(file)], file, timeout):
            number += 1
            shown.case(case.name, found)
            good &= all(line["status"] in GOOD for line in found)
    for suite in dict.fromkeys(case.suite for case in cases[:number]):
        flat.write_csv(folder / f"{suite}.jsonl")
    return good


def _ceilings(cases: Sequence[Case], options: Sequence[str]) -> Ceilings:
    """Measured in a process of its own, as the cases are. Raises RuntimeError where it dies."""
    threads = options[options.index("--threads") + 1]
    command = [sys.executable, "-m", "benchmarks.harness.ceilings", "--threads", threads]
    command += [cases[0].device, *dict.fromkeys(case.dtype for case in cases)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise RuntimeError(f"the device's ceilings could not be measured: {done.stderr.strip()}")
    return Ceilings(**json.loads(done.stdout.splitlines()[-1]))


def is_done(case: Case, folder: Path, facts: Mapping[str, Any]) -> bool:
    """Whether the case was timed, with all lines good and of these ``machine.facts``.

    Who is absent is written before anybody is timed: such lines alone say nothing.
    """
    found, same = lines_of(case, folder), ("commit", "tuning", "versions")
    good = all(line["status"] in GOOD for line in found)
    of_these = all(line.get(name) == facts[name] for line in found for name in same)
    return good and of_these and any("ms" in line for line in found)


def lines_of(case: Case, folder: Path) -> list[Line]:
    return _lines(case, _file(case, folder))


def _file(case: Case, folder: Path) -> Path:
    return (folder / f"{case.suite}.jsonl").resolve()


def run_some(
    batch: Sequence[Case], command: Sequence[str], file: Path, timeout: float
) -> list[tuple[Case, list[Line]]]:
    """The first cases of the batch, as far as ``command`` came, and their lines in ``file``.

    Earlier lines of those are replaced. One that ended the process has a line that says so, and is
    the last.
    """
    names = {case.name for case in batch}
    earlier = [line for line in lines.read(file) if line["case"] in names]
    lines.keep(file, lambda line: line["case"] not in names)
    try:
        ended, finished, stopped = _watch(command, timeout)
    except BaseException:
        _restore(earlier, file)
        raise
    tried = batch[:finished] if stopped else batch if ended is None else batch[: finished + 1]
    names -= {case.name for case in tried}
    _restore([line for line in earlier if line["case"] in names], file)
    for case in tried:
        if (ended is not None and case is tried[-1]) or not _lines(case, file):
            status, reason = ended or ("crashed", "it ended without a result")
            lines.write(
                {**identity(case), "provider": None, "status": status, "reason": reason}, file
            )
    return [(case, _lines(case, file)) for case in tried]


def _restore(earlier: Sequence[Line], file: Path) -> None:
    """Earlier lines of the cases that have no new ones."""
    new = {line["case"] for line in lines.read(file)}
    for line in earlier:
        if line["case"] not in new:
            lines.write(line, file)


def _watch(command: Sequence[str], timeout: float) -> tuple[tuple[str, str] | None, int, bool]:
    """How the process failed, or None; how many cases it finished; whether it had no more time.

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
                if _finished(_said(log.name)) > finished:
                    finished, since = finished + 1, time.monotonic()
            code = process.poll()
        finally:
            _end(process)
        said = _said(log.name)
        finished = _finished(said)
    if code is None:
        return ("timeout", f"killed after {timeout:g} s"), finished, False
    if code == 0:
        return None, finished, OUT_OF_TIME in said.splitlines()
    last = (said.strip().splitlines() or ["it said nothing"])[-1]
    how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return ("crashed", f"{how}: {last}"), finished, False


def _finished(said: str) -> int:
    return sum(line.startswith(FINISHED) for line in said.splitlines())


def _said(log: str) -> str:
    return Path(log).read_text(errors="replace")


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _lines(case: Case, file: Path) -> list[Line]:
    return [line for line in lines.read(file) if line["case"] == case.name]
