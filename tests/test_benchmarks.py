"""The harness: what is wrong is not timed, what is slow is seen, what dies leaves a line."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.nn import functional as nnf

from benchmarks import cases
from benchmarks.cli import main
from benchmarks.harness import gate, lines, one, runner, table, timer
from benchmarks.harness.screen import Plain
from benchmarks.harness.work import Absent, Case, Ceilings
from benchmarks.suites import linear, multi
from benchmarks.suites.linear import SCALING, Linear
from benchmarks.suites.merge import Merge, Swap
from benchmarks.suites.multi import Multi

ROOT = Path(__file__).resolve().parent.parent
SEEN = Ceilings(1e10, dict.fromkeys(("fp32", "fp16", "bf16"), 1e11))


def linear_case(**providers) -> Case:
    """A tiny forward case with these providers beside base, unfused torch and fastlora."""
    work = Linear(backward=False)
    work.providers = {k: work.providers[k] for k in ("base", "torch", "fastlora")} | providers
    return Case(work, "cpu", "fp32", {"M": 9, "K": 40, "N": 56, "R": 4})


def lines_of(case: Case) -> dict[str, dict]:
    measured = list(one.measure(case, SEEN, seconds=0.02))
    Plain(1).case(case.name, measured)
    return {line["provider"]: line for line in measured}


def right(o):
    return nnf.linear(o["x"], o["weight"]) + o["x"] @ o["lora_A"].T @ o["lora_B"].T * SCALING


WRONG = {
    "adapter ignored": lambda o: nnf.linear(o["x"], o["weight"]),
    "a little off": lambda o: right(o) * (1 + 1e-5),
    "one row wrong": lambda o: right(o).index_fill_(0, torch.tensor([8]), 0.0),
    "not a number": lambda o: right(o).mul_(float("nan")),
    "half precision": lambda o: right(o).half(),
}


@pytest.mark.parametrize("how", WRONG)
def test_a_wrong_provider_fails_its_gate_and_is_not_timed(how):
    calls = []

    def build(case, o):
        return lambda: calls.append(1) or {"y": WRONG[how](o)}

    found = lines_of(linear_case(wrong=build))
    assert found["wrong"]["status"] == "failed"
    assert "y: error" in found["wrong"]["reason"]
    assert "ms" not in found["wrong"]
    assert len(calls) == 1
    assert all(
        found[name]["status"] == "ok" and "ms" in found[name] for name in ("base", "fastlora")
    )


def test_rows_that_no_sample_shows_are_seen():
    """Of 32 rows seven are held to float64; all of them to unfused torch."""
    work = Multi("decode")
    sizes = {"T": 32, "K": 40, "N": 56, "R": 4, "S": 32}
    case = Case(work, "cpu", "fp32", sizes, workload="distinct")
    right_call = work.providers["fastlora"]

    def build(case, o):
        call = right_call(case, o)
        return lambda: {"y": call()["y"].index_fill(0, torch.tensor([1, 2, 3]), 0.5)}

    work.providers = {**work.providers, "wrong": build}
    verdicts = gate.check(case, seed=1)
    assert verdicts["fastlora"].status == "ok"
    assert verdicts["wrong"].status == "failed"
    assert verdicts["wrong"].reason.startswith("y, all of it")


@pytest.mark.parametrize("work", [Merge(unmerge=False), Swap()])
def test_an_adapter_that_is_merged_a_little_too_small_is_seen(work):
    case = Case(work, "cpu", "bf16", {"K": 64, "N": 48, "R": 8})
    build = work.providers["fastlora"]
    weaker = {"lora_B": 0.95, "other_B": 0.95}
    work.providers = {
        **work.providers,
        "weak": lambda case, o: build(case, {k: t * weaker.get(k, 1) for k, t in o.items()}),
    }
    verdicts = gate.check(case, seed=1)
    assert (verdicts["fastlora"].status, verdicts["weak"].status) == ("ok", "failed")


def test_a_provider_that_raises_or_answers_in_another_shape_is_an_error():
    def raises(case, o):
        raise RuntimeError("no kernel image")

    found = lines_of(linear_case(raises=raises, flat=lambda case, o: lambda: {"y": right(o)[0]}))
    assert found["raises"]["reason"] == "RuntimeError: no kernel image"
    assert found["raises"]["status"] == found["flat"]["status"] == "error"
    assert "ms" not in found["flat"]


def test_nobody_is_timed_without_a_yardstick():
    case = linear_case(torch=lambda case, o: lambda: {"y": right(o) * 1.1})
    found = lines_of(case)
    assert {line["status"] for line in found.values()} == {"failed", "error"}
    assert not any("ms" in line for line in found.values())


def test_an_absent_provider_is_said_to_be_absent():
    def absent(case, o):
        raise Absent("not installed")

    line = lines_of(linear_case(peer=absent))["peer"]
    assert (line["status"], line["reason"]) == ("absent", "not installed")


def test_a_slow_provider_is_seen_in_the_ratio():
    def build(case, o):
        return lambda: time.sleep(0.02) or {"y": right(o)}

    found = lines_of(linear_case(slow=build))
    assert found["slow"]["ms"]["p50"] >= 20
    assert found["slow"]["ratio"]["p50"] > 5 * found["torch"]["ratio"]["p50"]
    # Sleeping is no work: the clock of CPU time knows.
    assert found["slow"]["cpu_ms"]["p50"] < 20
    assert set(found["base"]["ratio"].values()) == {1}


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_gpu_s_own_time_is_measured():
    calls = {
        "short": [lambda: torch.cuda._sleep(100_000)],
        "long": [lambda: torch.cuda._sleep(2_000_000)],
        "host": [lambda: time.sleep(0.01)],
    }
    samples = timer.interleaved(calls, "cuda", 0.2)
    p50 = {name: timer.spread(of.ms)["p50"] for name, of in samples.items()}
    assert p50["long"] > 5 * p50["short"]


def test_providers_take_turns_on_their_copies():
    order = []
    calls = {
        name: [lambda n=name, i=i: order.append((n, i)) for i in range(4)]
        for name in ("a", "b", "c")
    }
    rounds = len(timer.interleaved(calls, "cpu", 0.0)["a"].ms)
    turns = order[-9 * rounds :]  # each of three calls: two warm the code, one is timed
    assert rounds == 10
    names = [n for n, _ in turns]
    assert all(names[i] == names[i + 1] == names[i + 2] for i in range(0, 9 * rounds, 3))
    orders = [tuple(names[i : i + 9 : 3]) for i in range(0, 9 * rounds, 9)]
    assert all(sorted(each) == ["a", "b", "c"] for each in orders)
    assert len(set(orders)) > 2  # nobody always follows the same neighbour
    assert [i for n, i in turns if n == "b"] == [i % 4 for i in range(3 * rounds)]
    assert timer.copies(2**20, 4) == 50
    # Not three: the last of a turn's calls would always be the same copy's.
    assert timer.copies(2**30, 4) == 4
    assert timer.copies(2**10, 4) == 200


def test_of_a_turn_the_last_call_is_timed():
    def slow():
        return time.sleep(0.02)

    calls = {"base": [slow, slow, lambda: None]}
    samples = timer.interleaved(calls, "cpu", 0.0)["base"]
    assert timer.spread(samples.ms)["p50"] < 10


# When tiny, many are the same.
TINY = {
    case.name: case
    for case in (
        dataclasses.replace(c, device="cpu", compiled=False).tiny()
        for c in (*cases.CPU, *cases.CUDA)
    )
}


@pytest.mark.parametrize("name", TINY)
def test_every_registered_case_passes_its_gate_when_tiny(name):
    if TINY[name].suite == "model":
        pytest.importorskip("transformers", reason="transformers is not installed")
    verdicts = gate.check(TINY[name], seed=1)
    assert verdicts.keys() >= {"base", "torch", "peft", "fastlora"}
    for provider, verdict in verdicts.items():
        allowed = ("ok", "absent") if "peft" in provider else ("ok",)
        assert verdict.status in allowed, (provider, verdict.reason)


def test_names_are_unique_and_select_cases():
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
    mixed = dataclasses.replace(forward, lora_dtype="fp32", dtype="bf16")
    assert mixed.work.cost(mixed, "torch")[1] == moved // 2 + adapter
    decode = Case(Multi("decode"), "cpu", "fp32", {"T": M, **sizes, "S": 4}, workload="distinct")
    assert decode.work.cost(decode, "peft") == (base + lora, moved + 2 * adapter)
    merge = Case(Merge(unmerge=True), "cpu", "bf16", sizes)
    assert merge.work.cost(merge, "torch") == (4 * N * K * R, 2 * (4 * N * K + adapter // 2))


def dying(script: str, file: Path, timeout: float = 60.0) -> list[dict]:
    command = [sys.executable, "-c", script, str(file)]
    ((_, found),) = runner.run_some([linear_case()], command, file, timeout)
    assert found == [json.loads(text) for text in file.read_text().splitlines()]
    return found


def test_a_hanging_case_is_killed_and_keeps_its_lines(tmp_path):
    half_way = {"case": linear_case().name, "provider": "base", "status": "ok"}
    script = (
        "import json, os, sys, time\n"
        f"line = {half_way!r} | {{'pid': os.getpid()}}\n"
        "print(json.dumps(line), file=open(sys.argv[1], 'a'), flush=True)\n"
        "time.sleep(600)"
    )
    started = time.monotonic()
    first, last = dying(script, tmp_path / "linear.jsonl", timeout=3)
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
def test_a_crash_is_a_line(tmp_path, script, reason):
    file = tmp_path / "linear.jsonl"
    for _ in range(2):  # the second run replaces the first one's line
        (line,) = dying(script, file)
    assert (line["status"], line["provider"]) == ("crashed", None)
    assert line["reason"].startswith(reason)
    assert any(reason in note for note in table.notes([line]))


def test_a_crash_costs_one_case_of_its_process(tmp_path):
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


def test_a_process_that_has_no_more_time_leaves_cases_unmeasured(tmp_path):
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


def test_the_cuda_kernels_are_providers(on_cuda_kernels):
    """On a GPU; here they run on the host, and are held to the same gate, or say why not."""
    from benchmarks.suites import linear, merge, multi

    def verdict(case: Case) -> str:
        case.work.providers |= {"cuda": case.work.gpu_providers["cuda"]}
        return gate.check(case, one.SEED)["cuda"].status

    case = dataclasses.replace(linear_case(), dtype="bf16")
    shapes = {"M": 8, "K": 64, "N": 48, "R": 8}
    for backward in (False, True):
        work = linear.Linear(backward=backward)
        assert verdict(dataclasses.replace(case, work=work, shape=shapes)) == "ok"
    odd = dataclasses.replace(case, work=linear.Linear(backward=False), shape=shapes | {"K": 63})
    assert verdict(odd) == "absent"
    swapped = {"N": 72, "K": 64, "R": 8}
    assert verdict(dataclasses.replace(case, work=merge.Swap(), shape=swapped)) == "ok"
    assert "cuda" in multi.Multi("decode").gpu_providers


def test_the_paths_of_the_triton_kernels_are_providers(monkeypatch):
    """On a GPU; here they are interpreted, and held to the same gate."""
    pytest.importorskip("triton", reason="triton is not installed")
    from fastlora.kernels.ledger import MULTI_PATHS, PATHS

    def held(case: Case, paths: tuple[str, ...]) -> None:
        assert set(paths).isdisjoint(case.providers)
        assert set(paths) <= set(dataclasses.replace(case, device="cuda").providers)
        case.work.providers |= case.work.gpu_providers
        verdicts = gate.check(case, one.SEED)
        for path in paths:
            verdict = verdicts[path]
            # Not every product can take every path, and no other stands in for it.
            assert verdict.status == "ok" or f"cannot run along {path!r}" in verdict.reason
        assert sum(verdicts[path].status == "ok" for path in paths) >= 2

    assert linear.PATHS == PATHS
    assert (*multi.PATHS, "added") == MULTI_PATHS
    for backward in (False, True):
        case = dataclasses.replace(linear_case(), work=Linear(backward=backward), dropout=0.2)
        held(case, PATHS)
    sizes = {"T": 9, "K": 24, "N": 40, "R": 12, "S": 3}
    mixed = Case(Multi("decode"), "cpu", "bf16", sizes, workload="distinct", ranks="mixed")
    held(mixed, multi.PATHS)


def test_limits_are_what_is_moved_and_computed():
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
def bare(tmp_path):
    """A copy of the checkout, and what runs its benchmarks with torch and numpy alone."""
    copy, blocker = tmp_path / "checkout", tmp_path / "blocker"
    for folder in ("fastlora", "kernels", "benchmarks"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("results"))
    (copy / "tests").mkdir()
    shutil.copy(ROOT / "tests" / "oracle.py", copy / "tests")
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
        file = copy / "benchmarks" / "results" / "cpu" / "1-thread-quick" / "linear.jsonl"
        return done, {line["provider"]: line for line in lines.read(file)}

    return copy, run


def test_a_bare_checkout_measures_without_peft(bare):
    copy, run = bare
    done, found = run()
    assert done.returncode == 0
    assert "absent: PEFT cannot be imported" in done.stdout
    assert found["peft"]["status"] == "absent"
    line = found["fastlora"]
    assert line["status"] == "ok"
    assert line["ms"]["p20"] <= line["ms"]["p50"] <= line["ms"]["p80"]
    assert line["gate"]["y"]["error"] <= line["gate"]["y"]["bound"]
    assert line["threads"] == 1
    assert line["versions"]["torch"] == torch.__version__
    assert line["tflops"] == pytest.approx(line["flops"] / line["ms"]["p50"] / 1e9)

    # The same with a provider that forgets the adapter.
    with (copy / "benchmarks" / "cases.py").open("a") as file:
        file.write("FORWARD.providers['wrong'] = FORWARD.providers['base']\n")
        file.write("FORWARD.providers['fastlora'] = lambda case, o: 1 / 0\n")
    done, found = run()
    assert done.returncode == 1
    assert "not everything passed" in done.stderr
    assert found["wrong"]["status"] == "failed"
    assert found["fastlora"]["status"] == "error"


def test_what_cannot_run_is_refused_in_one_line(capsys):
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
