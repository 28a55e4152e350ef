"""Cases in watched processes of their own: a crash or a hang costs that case alone.

A process appends its lines to the results file as they come. If it dies, a line says how, and the
cases after it get another process.
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
from benchmarks.harness import csv_file, lines
from benchmarks.harness.case import Case, Ceilings
from benchmarks.harness.lines import Line
from benchmarks.harness.measurement import describe_case
from benchmarks.harness.terminal import Screen

GOOD = ("ok", "absent")

# Cases that share a process, whose start and imports take longer than most cases.
_TOGETHER = 8
# Printed by a process when it has finished a case, and when it has no time for the others.
FINISHED, OUT_OF_TIME = "benchmarks: finished ", "benchmarks: out of time"


def run(
    cases: Sequence[Case],
    folder: Path,
    options: Sequence[str],
    timeout: float,
    shown: Screen,
    deadline: float | None = None,
) -> bool:
    """Measures the cases into ``folder``/<suite>.jsonl; returns whether all are good.

    options: of the command line, passed on to the processes. timeout: seconds for each case.
    deadline: seconds after which no further case is begun.
    """
    folder.mkdir(parents=True, exist_ok=True)
    good, number, began = True, 0, time.monotonic()
    if cases:
        shown.begin("the device's ceilings")
        options = [*options, "--ceilings", json.dumps(_measure_ceilings(cases, options)._asdict())]
    while number < len(cases):
        remaining = math.inf if deadline is None else deadline - (time.monotonic() - began)
        if remaining <= 0:
            shown.say(f"\nout of time: {len(cases) - number} cases were not begun")
            break
        first = cases[number]
        following = cases[number : number + _TOGETHER]
        batch = next(
            list(group) for _, group in itertools.groupby(following, key=lambda c: c.suite)
        )
        shown.begin(first.name)
        file = _find_file(first, folder)
        command = [sys.executable, "-m", "benchmarks", first.suite, "--device", first.device]
        command += options
        command += ["--deadline", f"{remaining:.1f}"] if math.isfinite(remaining) else []
        for case in batch:
            command += ["--one", case.name]
        for case, case_lines in run_some(batch, [*command, "--out", str(file)], file, timeout):
            number += 1
            shown.case(case.name, case_lines)
            good &= all(line["status"] in GOOD for line in case_lines)
    for suite in dict.fromkeys(case.suite for case in cases[:number]):
        csv_file.write_csv(folder / f"{suite}.jsonl")
    return good


def _measure_ceilings(cases: Sequence[Case], options: Sequence[str]) -> Ceilings:
    """Measures ceilings in a process of their own, as cases are; RuntimeError where it dies."""
    threads = options[options.index("--threads") + 1]
    command = [sys.executable, "-m", "benchmarks.harness.ceilings", "--threads", threads]
    command += [cases[0].device, *dict.fromkeys(case.dtype for case in cases)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise RuntimeError(f"the device's ceilings could not be measured: {done.stderr.strip()}")
    return Ceilings(**json.loads(done.stdout.splitlines()[-1]))


def is_done(case: Case, folder: Path, facts: Mapping[str, Any]) -> bool:
    """Whether the case was timed, with all lines good and of these ``machine.facts``.

    Absent providers are written before any is timed: their lines alone do not count.
    """
    case_lines, same = read_lines(case, folder), ("commit", "tuning", "versions")
    good = all(line["status"] in GOOD for line in case_lines)
    of_these = all(line.get(name) == facts[name] for line in case_lines for name in same)
    return good and of_these and any("ms" in line for line in case_lines)


def read_lines(case: Case, folder: Path) -> list[Line]:
    return _read_case(case, _find_file(case, folder))


def _find_file(case: Case, folder: Path) -> Path:
    return (folder / f"{case.suite}.jsonl").resolve()


def run_some(
    batch: Sequence[Case], command: Sequence[str], file: Path, timeout: float
) -> list[tuple[Case, list[Line]]]:
    """Runs ``command``; returns the cases that it came to, with their new lines in ``file``.

    Their earlier lines are replaced. A case that ended the process has a line that says so, and
    comes last.
    """
    names = {case.name for case in batch}
    earlier = [line for line in lines.read(file) if line["case"] in names]
    lines.filter_file(file, lambda line: line["case"] not in names)
    try:
        ended, finished, stopped = _watch(command, timeout)
    except BaseException:
        _restore(earlier, file)
        raise
    tried = batch[:finished] if stopped else batch if ended is None else batch[: finished + 1]
    names -= {case.name for case in tried}
    _restore([line for line in earlier if line["case"] in names], file)
    for case in tried:
        if (ended is not None and case is tried[-1]) or not _read_case(case, file):
            status, reason = ended or ("crashed", "it ended without a result")
            lines.write(
                {**describe_case(case), "provider": None, "status": status, "reason": reason}, file
            )
    return [(case, _read_case(case, file)) for case in tried]


def _restore(earlier: Sequence[Line], file: Path) -> None:
    """Writes back earlier lines of the cases that have no new ones."""
    new = {line["case"] for line in lines.read(file)}
    for line in earlier:
        if line["case"] not in new:
            lines.write(line, file)


def _watch(command: Sequence[str], timeout: float) -> tuple[tuple[str, str] | None, int, bool]:
    """Returns how the process failed (or None), how many cases it finished, if time ran out.

    The process and all that it started are gone on return.
    """
    with tempfile.NamedTemporaryFile() as log:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True
        )
        finished, since = 0, time.monotonic()
        try:
            while process.poll() is None and time.monotonic() - since < timeout:
                time.sleep(0.05)
                if _count_finished(_read_log(log.name)) > finished:
                    finished, since = finished + 1, time.monotonic()
            code = process.poll()
        finally:
            _end(process)
        log_text = _read_log(log.name)
        finished = _count_finished(log_text)
    if code is None:
        return ("timeout", f"killed after {timeout:g} s"), finished, False
    if code == 0:
        return None, finished, OUT_OF_TIME in log_text.splitlines()
    last = (log_text.strip().splitlines() or ["it said nothing"])[-1]
    ending = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return ("crashed", f"{ending}: {last}"), finished, False


def _count_finished(log_text: str) -> int:
    return sum(line.startswith(FINISHED) for line in log_text.splitlines())


def _read_log(log: str) -> str:
    return Path(log).read_text(errors="replace")


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _read_case(case: Case, file: Path) -> list[Line]:
    return [line for line in lines.read(file) if line["case"] == case.name]
