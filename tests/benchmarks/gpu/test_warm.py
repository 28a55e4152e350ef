"""Warming up compiles the kernels of each family in one process before benchmarks."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import cases
from benchmarks.gpu import warm
from benchmarks.harness.case import Absent, Case
from benchmarks.suites.linear import Linear
from benchmarks.suites.merge import Merge
from benchmarks.suites.multi import Multi

# Every provider of every case; the gate's quick tests call most of them.
pytestmark = pytest.mark.full

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("full", [False, True])
def test_group_by_family_puts_shared_kernels_together(device, full):
    chosen = cases.select(device, full=full)
    shares = warm.group_by_family(chosen)
    assert sorted(c.name for share in shares.values() for c in share) == sorted(
        c.name for c in chosen
    )
    sizes = [len(share) for share in shares.values()]
    assert sizes == sorted(sizes, reverse=True)
    of = {case.name: name for name, share in shares.items() for case in share}
    for case in chosen:
        for other in chosen:
            alike = (case.suite, case.dtype, case.lora_dtype or case.dtype, case.shape.get("R"))
            theirs = (other.suite, other.dtype, other.lora_dtype or other.dtype)
            if alike == (*theirs, other.shape.get("R")) and case.ranks == other.ranks:
                assert of[case.name] == of[other.name]


def tiny(work, shape, **options) -> Case:
    return Case(work, "cpu", "fp32", shape, **options)


LAYER = {"K": 40, "N": 56, "R": 4}


@pytest.mark.parametrize(
    "case",
    [
        tiny(Linear(backward=True), {"M": 9, **LAYER}, dropout=0.5, lora_dtype="fp32"),
        tiny(Multi("decode"), {"T": 12, **LAYER, "S": 5}, workload="distinct"),
        tiny(Multi("prefill"), {"B": 3, "L": 5, **LAYER, "S": 5}, workload="zipf"),
        tiny(Merge(unmerge=True), LAYER),
    ],
    ids=lambda case: case.name,
)
def test_call_all_calls_every_provider_once(case):
    called = []

    def counted(name, build):
        def built(case, o):
            call = build(case, o)
            return lambda: called.append(name) or call()

        return built

    work = case.work
    work.providers = {name: counted(name, build) for name, build in work.providers.items()}
    counts = warm.call_all([case], float("inf"))
    assert sorted(called) == sorted(case.providers)
    assert (counts["called"] + counts["absent"], counts["raised"]) == (len(called), {})
    assert called[:2] == ["base", "torch"]


def test_call_all_counts_raising_and_absent_providers():
    def raises(case, o):
        raise RuntimeError("no kernel image")

    def absent(case, o):
        raise Absent("not installed")

    case = tiny(Linear(backward=False), {"M": 9, **LAYER})
    case.work.providers = {"raises": raises, "absent": absent, "base": case.work.providers["base"]}
    counts = warm.call_all([case], float("inf"))
    reasons = {f"{case.name}, raises": "RuntimeError: no kernel image"}
    assert counts == {"called": 1, "absent": 1, "raised": reasons, "left": 0}


def test_call_all_calls_the_gated_case_too():
    seen = []

    class Gated(Linear):
        def gated(self, case):
            return replace(case, shape={**case.shape, "M": 3})

    work = Gated(backward=False)
    work.providers = {"base": lambda case, o: lambda: seen.append(tuple(o["x"].shape))}
    warm.call_all([tiny(work, {"M": 9, **LAYER})], float("inf"))
    assert seen == [(3, 40), (9, 40)]


def test_call_all_begins_no_case_after_deadline():
    case = tiny(Linear(backward=False), {"M": 9, **LAYER})
    assert warm.call_all([case, case], 0.0) == {
        "called": 0, "absent": 0, "raised": {}, "left": 2,
    }  # fmt: skip


def test_warm_runs_each_family_in_separate_process(monkeypatch, capsys):
    begun = []

    def run(command, **options):
        name = command[command.index("--family") + 1]
        begun.append(name)
        if "multi" in name:
            return subprocess.CompletedProcess(command, -11, "", "Segmentation fault\n")
        counts = {"called": 3, "absent": 1, "raised": {"a case, peft": "why"}, "left": 2}
        return subprocess.CompletedProcess(command, 0, f"a warning\n{json.dumps(counts)}\n", "")

    monkeypatch.setattr(warm.subprocess, "run", run)
    assert warm.main(["--device", "cpu", "--jobs", "3", "--quick"]) == 0
    assert sorted(begun) == sorted(warm.group_by_family(cases.select("cpu", quick=True)))
    said = capsys.readouterr().out
    assert "linear-bf16-R16-bf16 (2 cases): 3 called, 1 absent, 1 raised, 2 cases left\n" in said
    assert "  a case, peft: why\n" in said
    assert "multi-bf16-R16-bf16 (1 cases): exit code -11: Segmentation fault\n" in said


def test_warm_ends_hanging_case_after_deadline(monkeypatch, capsys):
    sleeps = [sys.executable, "-c", "import time; time.sleep(600)"]
    run = subprocess.run
    monkeypatch.setattr(warm.subprocess, "run", lambda command, **options: run(sleeps, **options))
    monkeypatch.setattr(warm, "_LATE", 0.2)
    started = time.monotonic()
    assert warm.main(["--device", "cpu", "--jobs", "9", "--quick", "--deadline", "0.5"]) == 0
    assert time.monotonic() - started < 30
    assert "linear-bf16-R16-bf16 (2 cases): out of time within a case\n" in capsys.readouterr().out


@pytest.mark.full  # the same without a process is quick
def test_warm_process_reports_what_it_called():
    command = [sys.executable, "-m", "benchmarks.gpu.warm", "--device", "cpu", "--jobs", "1"]
    command += ["--case", "linear-forward-bf16-M1-K2048-N2048-R16"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("linear-bf16-R16-bf16 (1 cases): ")
    assert ", 0 raised" in done.stdout


def test_warm_exits_2_without_gpu(monkeypatch, capsys):
    monkeypatch.setattr(warm.torch.cuda, "is_available", lambda: False)
    assert warm.main(["--device", "cuda"]) == 2
    assert "finds no usable CUDA GPU here" in capsys.readouterr().err
