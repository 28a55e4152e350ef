"""The harness does not time wrong providers and reports slow or crashed ones."""

import dataclasses
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import cases
from benchmarks.cli import main
from benchmarks.harness import lines, timer
from benchmarks.harness.case import Case, Ceilings
from benchmarks.suites.linear import Linear, LinearAdd
from benchmarks.suites.merge import Merge
from benchmarks.suites.multi import Multi
from tests.benchmarks.small_case import correct_output, linear_case, lines_of

ROOT = Path(__file__).resolve().parents[2]


def test_slow_provider_shows_in_the_ratio():
    def build(case, o):
        return lambda: time.sleep(0.02) or {"y": correct_output(o)}

    found = lines_of(linear_case(slow=build))
    assert found["slow"]["ms"]["p50"] >= 20
    assert found["slow"]["ratio"]["p50"] > 5 * found["torch"]["ratio"]["p50"]
    # Sleeping is no work: the clock of CPU time knows.
    assert found["slow"]["cpu_ms"]["p50"] < 20
    assert set(found["base"]["ratio"].values()) == {1}


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_timer_measures_time_of_the_gpu():
    calls = {
        "short": [lambda: torch.cuda._sleep(100_000)],
        "long": [lambda: torch.cuda._sleep(2_000_000)],
        "host": [lambda: time.sleep(0.01)],
    }
    samples = timer.time_in_turns(calls, "cuda", 0.2)
    p50 = {name: timer.compute_spread(of.ms)["p50"] for name, of in samples.items()}
    assert p50["long"] > 5 * p50["short"]


def test_timer_runs_providers_in_turns_on_copies():
    order = []
    calls = {
        name: [lambda n=name, i=i: order.append((n, i)) for i in range(4)]
        for name in ("a", "b", "c")
    }
    rounds = len(timer.time_in_turns(calls, "cpu", 0.0)["a"].ms)
    turns = order[-9 * rounds :]  # each of three calls: two warm the code, one is timed
    assert rounds == 10
    names = [n for n, _ in turns]
    assert all(names[i] == names[i + 1] == names[i + 2] for i in range(0, 9 * rounds, 3))
    orders = [tuple(names[i : i + 9 : 3]) for i in range(0, 9 * rounds, 9)]
    assert all(sorted(each) == ["a", "b", "c"] for each in orders)
    assert len(set(orders)) > 2  # nobody always follows the same neighbour
    assert [i for n, i in turns if n == "b"] == [i % 4 for i in range(3 * rounds)]
    assert timer.count_copies(2**20, 4) == 50
    # Not three: the last of a turn's calls would always be the same copy's.
    assert timer.count_copies(2**30, 4) == 4
    assert timer.count_copies(2**10, 4) == 200


def test_timer_counts_last_call_of_a_turn():
    def slow():
        return time.sleep(0.02)

    calls = {"base": [slow, slow, lambda: None]}
    samples = timer.time_in_turns(calls, "cpu", 0.0)["base"]
    assert timer.compute_spread(samples.ms)["p50"] < 10


def test_case_names_are_unique_and_selectable():
    for device, listed in (("cpu", cases.CPU), ("cuda", cases.CUDA)):
        assert len({case.name for case in listed}) == len(listed)
        assert all(case.device == device and case.suite in cases.SUITES for case in listed)
        assert cases.select(device) == list(listed)
        assert 0 < len(cases.select(device, quick=True)) < len(listed)
        assert {case.suite for case in cases.select(device, suite="merge")} == {"merge"}
        assert all("train" in case.name for case in cases.select(device, name="*train*"))


def test_costs_count_every_operand_once():
    M, K, N, R = shape = (2, 3, 5, 1)
    sizes = dict(zip("MKNR", shape, strict=True))
    base, lora = 2 * M * K * N, 2 * M * R * (K + N)
    moved, adapter = 4 * (M * K + K * N + M * N), 4 * R * (K + N)
    forward = Case(Linear(backward=False), "cpu", "fp32", sizes)
    assert forward.work.cost(forward, "base") == (base, moved)
    assert forward.work.cost(forward, "torch") == (base + lora, moved + adapter)
    train = dataclasses.replace(forward, work=Linear(backward=True))
    assert train.work.cost(train, "base") == (2 * base, 2 * moved)
    assert train.work.cost(train, "torch") == (
        2 * base + 3 * lora,
        2 * moved + 4 * M * K + 3 * adapter,
    )
    add = dataclasses.replace(forward, work=LinearAdd())
    assert add.work.cost(add, "base") == (base, moved)
    assert add.work.cost(add, "torch") == (lora, 4 * (M * K + 2 * M * N) + adapter)
    mixed = dataclasses.replace(forward, lora_dtype="fp32", dtype="bf16")
    assert mixed.work.cost(mixed, "torch")[1] == moved // 2 + adapter
    decode = Case(Multi("decode"), "cpu", "fp32", {"T": M, **sizes, "S": 4}, workload="distinct")
    assert decode.work.cost(decode, "peft") == (base + lora, moved + 2 * adapter)
    merge = Case(Merge(unmerge=True), "cpu", "bf16", sizes)
    assert merge.work.cost(merge, "torch") == (4 * N * K * R, 2 * (4 * N * K + adapter // 2))


def test_limit_counts_bytes_moved_and_flops():
    """A decode step's: the weight, x, y and the adapters in use, of the ranks that they have."""
    sizes = {"T": 32, "K": 4096, "N": 4096, "R": 128, "S": 5}
    case = Case(Multi("decode"), "cuda", "bf16", sizes, workload="distinct", ranks="mixed")
    base, ranks = 4096 * 4096 + 32 * 8192, 8 + 16 + 32 + 64 + 128
    slow_memory = Ceilings(1e9, {"bf16": 1e15})
    least = case.work.least(case, "fastlora", slow_memory)
    assert least == pytest.approx(2 * (base + ranks * 8192) / 1e9)
    slow_products = Ceilings(1e15, {"bf16": 1e9})
    assert case.work.least(case, "base", slow_products) == pytest.approx(2 * 32 * 4096**2 / 1e9)


BLOCKED = ("peft", "transformers", "accelerate", "rich", "matplotlib", "pytest_benchmark")


@pytest.fixture
def bare_checkout(tmp_path):
    """A copy of the checkout, and what runs its benchmarks with torch and numpy alone."""
    copy, blocker = tmp_path / "checkout", tmp_path / "blocker"
    for folder in ("fastlora", "kernels", "benchmarks"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("results"))
    (copy / "tests" / "support").mkdir(parents=True)
    shutil.copy(ROOT / "tests" / "support" / "oracle.py", copy / "tests" / "support")
    blocker.mkdir()
    blocks = f"import sys; sys.modules.update(dict.fromkeys({BLOCKED!r}))"
    (blocker / "sitecustomize.py").write_text(blocks)

    def run():
        command = [sys.executable, "-m", "benchmarks", "linear", "--quick", "--threads", "1"]
        command += ["--device", "cpu", "--case", "linear-forward*"]
        env = {**os.environ, "PYTHONPATH": str(blocker)}
        done = subprocess.run(
            command, cwd=copy, env=env, capture_output=True, text=True, timeout=300
        )
        print(done.stdout, done.stderr)
        (file,) = (copy / "benchmarks" / "results").glob("cpu/*/1-thread-quick/linear.jsonl")
        return done, {line["provider"]: line for line in lines.read(file)}

    return copy, run


@pytest.mark.full  # a process of its own, 12 s
def test_bare_checkout_measures_without_peft(bare_checkout):
    copy, run = bare_checkout
    # Beside providers that forget the adapter, and that end in an error.
    with (copy / "benchmarks" / "cases.py").open("a") as file:
        file.write("FORWARD.providers['wrong'] = FORWARD.providers['base']\n")
        file.write("FORWARD.providers['broken'] = lambda case, o: 1 / 0\n")
    done, found = run()
    assert done.returncode == 1
    assert "not everything passed" in done.stderr
    assert found["wrong"]["status"] == "failed"
    assert found["broken"]["status"] == "error"
    assert "absent: PEFT cannot be imported" in done.stdout
    assert found["peft"]["status"] == "absent"
    line = found["fastlora"]
    assert line["status"] == "ok"
    assert line["ms"]["p20"] <= line["ms"]["p50"] <= line["ms"]["p80"]
    assert line["gate"]["y"]["error"] <= line["gate"]["y"]["bound"]
    assert line["threads"] == 1
    assert line["versions"]["torch"] == torch.__version__
    assert line["tflops"] == pytest.approx(line["flops"] / line["ms"]["p50"] / 1e9)


def test_bench_refuses_impossible_runs_in_one_line(capsys):
    assert main(["--device", "cpu", "--case", "no such case"]) == 2
    assert capsys.readouterr().err == "benchmarks: no case matches; --list shows their names\n"
    assert main(["--device", "cpu", "--one", "linear-*"]) == 2
    assert "no case is called 'linear-*'" in capsys.readouterr().err
    assert main(["merge", "--device", "cpu", "--compare", "nowhere.jsonl"]) == 2
    assert "--compare: expected results" in capsys.readouterr().err
    assert main(["model", "--device", "cpu", "--shapes", "8,64,64,4"]) == 2
    assert "--shapes: expected suite linear, multi or merge, got 'model'" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["--shapes", "8,64,0,4"])
    assert "expected M,K,N,R or M,K,N,R,S" in capsys.readouterr().err
    assert main(["report", "nowhere"]) == 2
    assert "report: expected results such as linear.jsonl, found none in nowhere" in (
        capsys.readouterr().err
    )
    for full in ([], ["--full"]):
        assert main(["--device", "cuda", "--list", *full]) == 0
        listed = [case for case in cases.CUDA if full or not case.full]
        assert len(capsys.readouterr().out.splitlines()) == len(listed)
    if not torch.cuda.is_available():
        assert main(["--device", "cuda"]) == 2
        (said,) = capsys.readouterr().err.splitlines()
        assert "finds no usable CUDA GPU" in said
