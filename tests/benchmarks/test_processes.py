"""A case that hangs or crashes in its process leaves a line and costs only itself."""

import dataclasses
import json
import os
import sys
import time
from pathlib import Path

import pytest

from benchmarks.harness import lines, runner, table
from tests.benchmarks.small_case import linear_case


def run_script(script: str, file: Path, timeout: float = 60.0) -> list[dict]:
    command = [sys.executable, "-c", script, str(file)]
    ((_, found),) = runner.run_some([linear_case()], command, file, timeout)
    assert found == [json.loads(text) for text in file.read_text().splitlines()]
    return found


def test_hanging_case_is_killed_and_keeps_its_lines(tmp_path):
    half_way = {"case": linear_case().name, "provider": "base", "status": "ok"}
    script = (
        "import json, os, sys, time\n"
        f"line = {half_way!r} | {{'pid': os.getpid()}}\n"
        "print(json.dumps(line), file=open(sys.argv[1], 'a'), flush=True)\n"
        "time.sleep(600)"
    )
    started = time.monotonic()
    first, last = run_script(script, tmp_path / "linear.jsonl", timeout=3)
    assert time.monotonic() - started < 60
    assert first["provider"] == "base"
    assert (last["status"], last["reason"]) == ("timeout", "killed after 3 s")
    assert last["shape"] == {"M": 9, "K": 40, "N": 56, "R": 4}
    with pytest.raises(ProcessLookupError):
        os.kill(first["pid"], 0)


@pytest.mark.parametrize(
    "script, reason",
    [
        ("import os; os.abort()", "signal SIGABRT"),
        ("raise SystemExit('out of memory')", "exit code 1: out of memory"),
        ("pass", "it ended without a result"),
    ],
)
def test_crashed_process_leaves_a_line_with_reason(tmp_path, script, reason):
    file = tmp_path / "linear.jsonl"
    for _ in range(2):  # the second run replaces the first one's line
        (line,) = run_script(script, file)
    assert (line["status"], line["provider"]) == ("crashed", None)
    assert line["reason"].startswith(reason)
    assert any(reason in note for note in table.make_notes([line]))


def test_crash_costs_only_the_running_case(tmp_path):
    """What was finished before stays; what comes after is left for another process."""
    small = linear_case()
    batch = [dataclasses.replace(small, shape={**small.shape, "M": M}) for M in (1, 2, 3)]
    line = {"case": batch[0].name, "provider": "base", "status": "ok"}
    script = (
        "import json, os, sys\n"
        f"print(json.dumps({line!r}), file=open(sys.argv[1], 'a'), flush=True)\n"
        f"print({runner.FINISHED + batch[0].name!r}, flush=True)\n"
        "os.abort()"
    )
    file = tmp_path / "linear.jsonl"
    tried = runner.run_some(batch, [sys.executable, "-c", script, str(file)], file, 60.0)
    assert [case.name for case, _ in tried] == [case.name for case in batch[:2]]
    assert [[line["status"] for line in lines] for _, lines in tried] == [["ok"], ["crashed"]]


def test_process_out_of_time_leaves_cases_unmeasured(tmp_path):
    batch = [dataclasses.replace(linear_case(), shape={"M": M}) for M in (1, 2)]
    file = tmp_path / "linear.jsonl"
    script = (
        f"print({runner.FINISHED + batch[0].name!r}, flush=True)\n"
        f"print({json.dumps({'case': batch[0].name, 'status': 'ok'})!r},"
        f" file=open({str(file)!r}, 'a'))\n"
        f"print({runner.OUT_OF_TIME!r})"
    )
    for case in batch:
        lines.write({"case": case.name, "status": "ok", "earlier": True}, file)
    tried = runner.run_some(batch, [sys.executable, "-c", script], file, 60.0)
    assert [(case.name, len(found)) for case, found in tried] == [(batch[0].name, 1)]
    assert [line.get("earlier") for line in lines.read(file)] == [None, True]
