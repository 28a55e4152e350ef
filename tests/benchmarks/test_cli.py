"""`fastlora bench` measures, keeps, compares and resumes what is requested."""

import json
import subprocess
import sys
import time

import pytest
import torch

from benchmarks import cases
from benchmarks import cli as bench
from benchmarks.harness import ceilings, lines, machine, runner, terminal, timer
from fastlora.commands import main as cli
from tests.benchmarks.small_case import SEEN, linear_case
from tests.benchmarks.small_runs import quick_folder


def test_bench_measures_custom_shapes(bench_linear, capsys):
    code, found = bench_linear()
    said = capsys.readouterr().out
    assert code == 0
    assert {line["case"] for line in found} == {
        "linear-forward-fp32-M4-K32-N48-R4",
        "linear-train-fp32-M4-K32-N48-R4",
    }
    line = next(ln for ln in found if ln["provider"] == "fastlora")
    assert line["ratio"]["low"] <= line["ratio"]["p50"] <= line["ratio"]["high"]
    assert line["ceilings"] == SEEN._asdict()
    least = max(line["bytes"] / 1e10, line["flops"] / 1e11)
    assert line["share"] == pytest.approx(least / line["ms"]["p50"] * 1e3)
    assert line["peak_bytes"] >= 4 * 4 * 48
    assert "bootstrap" in line["method"]
    assert line["commit"] == machine.find_commit()
    assert {"load"} <= line["clocks"].keys()
    assert all(name in line["versions"] for name in machine.PEERS)
    assert "linear-train-fp32-M4-K32-N48-R4" in said
    assert "fastlora bench report" in said


def test_bench_resume_skips_cases_already_measured(bench_in_process, tmp_path, monkeypatch):
    bench_in_process("--case", "*")
    folder = quick_folder(tmp_path)
    stamps = {line["timestamp"]: 0 for line in lines.read_all(folder)}
    time.sleep(1.1)
    assert bench_in_process("--resume")[0] == 0
    assert {line["timestamp"]: 0 for line in lines.read_all(folder)} == stamps
    # Another commit's lines are measured, another torch's, those of a case that did not pass, and
    # of one that was interrupted before anybody was timed.
    facts = machine.collect_facts("cpu")
    case = cases.make_custom("cpu", "linear", [(4, 32, 48, 4)], ["fp32"])[0]
    assert runner.is_done(case, folder, facts)
    for name in ("commit", "tuning", "versions"):
        assert not runner.is_done(case, folder, {**facts, name: "another"})
    file = folder / "linear.jsonl"
    lines.write({"case": case.name, "status": "failed", **facts}, file)
    assert not runner.is_done(case, folder, facts)
    lines.filter_file(file, lambda line: line["case"] != case.name)
    lines.write({"case": case.name, "status": "absent", **facts}, file)
    assert not runner.is_done(case, folder, facts)


def test_bench_begins_no_case_after_deadline(bench_in_process, capsys):
    with pytest.raises(FileNotFoundError):
        bench_in_process("--deadline", "0.000001")
    assert "out of time: 2 cases were not begun" in capsys.readouterr().out


class Clock:
    """The host's, which stands still but for what is slept."""

    def __init__(self) -> None:
        self.now = 1.0

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def perf_counter(self) -> float:
        return self.now

    def perf_counter_ns(self) -> int:
        return round(1e9 * self.now)

    process_time_ns = perf_counter_ns


def test_gpu_timer_runs_with_simulated_events(monkeypatch):
    """The calls of torch.cuda, with events of the host's clock."""
    clock = Clock()

    class Event:
        """A CUDA event of a GPU that is as fast as the host."""

        def record(self) -> None:
            self.at = clock.perf_counter()

        def query(self) -> bool:
            return False

        def elapsed_time(self, end) -> float:
            return 1e3 * (end.at - self.at)

    monkeypatch.setattr(timer, "time", clock)
    monkeypatch.setattr(torch.cuda, "Event", lambda **_: Event())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: None)
    assert ceilings._time(lambda: clock.sleep(0.01), "cuda") == pytest.approx(0.01)
    calls = {"short": [lambda: None], "long": [lambda: clock.sleep(0.01)]}
    for how in ({}, {"waits": True}, {"host_only": True}):
        samples = timer.time_in_turns(calls, "cuda", 0.1, **how)
        assert timer.compute_spread(samples["long"].ms)["p50"] == pytest.approx(10)
        assert timer.compute_spread(samples["short"].ms)["p50"] == pytest.approx(0)
        assert samples["long"].late == (None if how else 0)


def test_ceilings_measure_plausible_bandwidth_and_flops(monkeypatch):
    monkeypatch.setattr(ceilings, "_BYTES", {"cpu": 2**25})
    monkeypatch.setattr(ceilings, "_SIZE", {"cpu": 256})
    seen = ceilings.measure("cpu", ["fp32", "bf16"])
    assert 1e8 < seen.bandwidth < 1e13
    assert seen.flops.keys() == {"fp32", "bf16"}
    assert all(1e8 < each < 1e14 for each in seen.flops.values())


@pytest.mark.parametrize(
    "words, said",
    [
        (["--threads", "-1"], "expected a whole number of 1 or more, got '-1'"),
        (["--threads", "0"], "expected a whole number of 1 or more, got '0'"),
        (["--timeout", "-5"], "expected a number above 0, got '-5'"),
        (["--deadline", "nan"], "expected a number above 0, got 'nan'"),
        (["--dtype", "fp16"], "--dtype: expected --shapes with it"),
        (["linear", "--shapes", "8,64,64,8,4"], "expected M,K,N,R for suite linear"),
    ],
)
def test_bench_refuses_invalid_option_values(words, said, capsys):
    try:
        code = bench.main(["--device", "cpu", *words])
    except SystemExit as ended:
        code = ended.code
    assert code == 2
    assert said in capsys.readouterr().err


def test_report_command_refuses_broken_file_in_one_line(tmp_path, capsys):
    (tmp_path / "linear.jsonl").write_text("{}\n")
    assert bench.main(["report", str(tmp_path)]) == 2
    assert "linear.jsonl, line 1: expected a line of results" in capsys.readouterr().err


def test_read_lines_names_broken_file_and_line(tmp_path):
    file = tmp_path / "linear.jsonl"
    file.write_text('{"case": "a", "status": "ok"}\n{"case": \n')
    with pytest.raises(ValueError, match=r"linear.jsonl, line 2: expected JSON"):
        lines.read(file)
    file.write_text("[1]\n")
    with pytest.raises(ValueError, match="line 1: expected a line of results"):
        lines.read(file)


def test_screen_is_plain_text_without_rich(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    rich = terminal.open_screen(1)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    plain = terminal.open_screen(1)
    assert isinstance(plain, terminal.Plain)
    assert isinstance(rich, terminal.Rich)
    broken = {"case": "a", "provider": "peft", "status": "absent", "reason": "[not] installed"}
    monkeypatch.undo()
    for each in (plain, rich):
        with each as shown:
            shown.begin("a case")
            shown.case("a case", [broken])
            shown.table(["case", "b"], [["some", "1"], ["another", "22"]])
        said = capsys.readouterr().out
        assert "peft: absent: [not] installed" in said
        assert "another" in said


def test_bench_command_explains_itself_outside_a_checkout(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(cli.fastlora, "__file__", str(tmp_path / "fastlora" / "__init__.py"))
    assert cli.main(["bench", "--list"]) == 2
    assert "benchmarks come with the sources" in capsys.readouterr().err


def test_find_commit_marks_uncommitted_changes(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    (tmp_path / "kernels" / "tuning").mkdir(parents=True)
    source = tmp_path / "kernels" / "a.py"
    source.write_text("a = 1\n")
    outside = machine.find_commit()
    assert outside.startswith("files ")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "a"]):
        subprocess.run([*git, *command], check=True)
    clean = machine.find_commit()
    assert len(clean) == 40
    (tmp_path / "kernels" / "tuning" / "a.json").write_text(json.dumps([]))
    assert machine.find_commit() == clean
    source.write_text("a = 2\n")
    changed = machine.find_commit()
    assert changed.startswith(clean + "+changes ")
    source.write_text("a = 3\n")
    assert machine.find_commit() not in (clean, changed)


def test_bench_finds_named_case_despite_quick():
    case = next(case for case in cases.CPU if not case.quick)
    command = [
        sys.executable,
        "-m",
        "benchmarks",
        case.suite,
        "--device",
        "cpu",
        "--quick",
        "--list",
    ]
    listed = subprocess.run(command, cwd=runner.ROOT, capture_output=True, text=True).stdout
    assert case.name not in listed
    arguments = bench._make_parser("x").parse_args(
        ["--device", "cpu", "--quick", "--one", case.name]
    )
    assert case.name in {found.name for found in bench._select(arguments)}
    assert linear_case().name not in listed
