"""``fastlora bench``: what is asked for is measured, kept, compared, and taken up again."""

import json
import subprocess
import sys
import time

import pytest
import torch

from benchmarks import cases
from benchmarks import cli as bench
from benchmarks.harness import ceilings, lines, machine, measurement, runner, terminal, timer
from benchmarks.reports import compare
from fastlora.commands import main as cli
from tests.benchmarks.small_case import SEEN, linear_case

SMALL = ["--device", "cpu", "--quick", "--threads", "1", "--shapes", "4,32,48,4", "--dtype", "fp32"]


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def quick_folder(root):
    """Where ``--save root --quick`` puts its lines, once it has set the number of threads."""
    return root / (machine.name_folder("cpu") + "-quick")


@pytest.fixture
def bench_linear(tmp_path, monkeypatch):
    """``fastlora bench`` on two tiny layers, ceilings given; its exit code and lines."""
    monkeypatch.setattr(runner, "_measure_ceilings", lambda *_: SEEN)

    def run(*more: str) -> tuple[int, list[lines.Line]]:
        code = cli.main(["bench", "linear", *SMALL, "--save", str(tmp_path), *more])
        return code, lines.read_all(quick_folder(tmp_path))

    return run


@pytest.fixture
def measured(bench_linear, monkeypatch):
    """The same without a process for each case."""

    def run_some(batch, command, file, timeout):
        names = {case.name for case in batch}
        lines.filter_file(file, lambda line: line["case"] not in names)
        for case in batch:
            for line in measurement.measure(case, SEEN, seconds=0.05):
                lines.write(line, file)
        return [(case, runner._read_case(case, file)) for case in batch]

    monkeypatch.setattr(runner, "run_some", run_some)
    return bench_linear


def test_shapes_of_ones_own_are_measured(bench_linear, capsys):
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


def test_what_is_measured_is_not_measured_again(measured, tmp_path, monkeypatch):
    measured("--case", "*")
    folder = quick_folder(tmp_path)
    stamps = {line["timestamp"]: 0 for line in lines.read_all(folder)}
    time.sleep(1.1)
    assert measured("--resume")[0] == 0
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


def test_after_the_deadline_no_case_is_begun(measured, capsys):
    with pytest.raises(FileNotFoundError):
        measured("--deadline", "0.000001")
    assert "out of time: 2 cases were not begun" in capsys.readouterr().out


def slower(line: lines.Line, by: float, *providers: str) -> lines.Line:
    if line["provider"] not in providers:
        return line
    return {**line, "ratio": {k: by * v for k, v in line["ratio"].items()}}


def made_up(**ratios: float) -> list[lines.Line]:
    return [
        {
            "case": "a case",
            "provider": name.replace("_", "-"),
            "device_name": "a CPU",
            "threads": 1,
            "ratio": {"p50": ratio},
        }
        for name, ratio in {"base": 1.0, **ratios}.items()
    ]


def test_a_slow_down_by_half_is_seen_and_noise_is_not():
    before = made_up(torch=1.2, fastlora=1.1, peft=1.3)

    def judged(**now: float) -> bool:
        (change,) = compare.list_changes(made_up(**now), before)
        return change.slower

    assert judged(torch=1.2, fastlora=1.65)
    assert judged(torch=1.15, fastlora=1.6)
    assert not judged(torch=1.2, fastlora=1.3)
    # The base was quick, or torch slow: not ours.
    assert not judged(torch=1.8, fastlora=1.65)
    assert not judged(torch=0.8, fastlora=1.15)
    elsewhere = [{**line, "device_name": "another"} for line in made_up(torch=1.2, fastlora=3.0)]
    (change,) = compare.list_changes(elsewhere, before)
    assert not change.slower
    assert "another device" in compare.make_table([change])[1][0]


def test_a_run_that_is_slower_than_an_earlier_one_fails(measured, tmp_path, capsys):
    """Earlier results that say ours was twice as fast; the run finds it slow three times."""
    _, found = measured()
    honest, faster = tmp_path / "honest.jsonl", tmp_path / "faster.jsonl"
    for line in found:
        lines.write(line, honest)
        lines.write(slower(line, 1 / 20, "fastlora"), faster)
    assert measured("--compare", str(faster))[0] == 1
    said = capsys.readouterr()
    assert "slower each of 3 times: linear-forward-fp32-M4-K32-N48-R4" in said.out
    assert "not everything passed" in said.err
    generous = tmp_path / "slower.jsonl"
    for line in found:
        lines.write(slower(line, 20, "fastlora"), generous)
    assert measured("--compare", str(generous))[0] == 0


def test_a_crash_of_the_second_measurement_is_no_recovery(measured, tmp_path, monkeypatch):
    _, found = measured()
    earlier = tmp_path / "earlier.jsonl"
    for line in found:
        lines.write(slower(line, 1 / 20, "fastlora"), earlier)
    runs, run = [], runner.run

    def crashing(*args):
        runs.append(1)
        return run(*args) if len(runs) == 1 else False

    monkeypatch.setattr(runner, "run", crashing)
    assert measured("--compare", str(earlier))[0] == 1


def test_lines_of_another_device_are_not_judged(measured, tmp_path, capsys):
    _, found = measured()
    earlier = tmp_path / "earlier.jsonl"
    for line in found:
        lines.write({**slower(line, 1 / 20, "fastlora"), "device_name": "another"}, earlier)
    assert measured("--compare", str(earlier))[0] == 0
    assert "nothing was judged" in capsys.readouterr().out


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


def test_a_gpu_s_clock_starts_for_anybody(monkeypatch):
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


def test_what_was_slow_once_is_measured_again(measured, tmp_path, monkeypatch, capsys):
    """A run in which something else wanted the machine, and then a quiet one."""
    _, found = measured()
    earlier, quiet, runs = tmp_path / "earlier.jsonl", measurement.measure, []
    for line in found:
        lines.write({**line, "ratio": {"p50": 1.0}}, earlier)

    def disturbed(case, *args, **how):
        runs.append(case.name)
        slow = 9.0 if runs.count(case.name) == 1 else 1.0
        for line in quiet(case, *args, **how):
            ours = line["provider"] == "fastlora"
            yield {**line, "ratio": {"p50": slow if ours else 1.0}, "cpu_ratio": {"p50": 1.0}}

    monkeypatch.setattr(measurement, "measure", disturbed)
    monkeypatch.setattr(terminal.table, "make_rows", lambda _: [])
    assert measured("--compare", str(earlier))[0] == 0
    assert "slower, measured again: linear-forward" in capsys.readouterr().out
    assert len(runs) == 4


def test_the_interval_holds_the_median_and_narrows():
    draw = torch.Generator().manual_seed(0)
    values = (1 + 0.1 * torch.randn(300, generator=draw)).tolist()
    few, many = timer.compute_interval(values[:10]), timer.compute_interval(values)
    assert few["low"] < timer.compute_spread(values[:10])["p50"] < few["high"]
    assert many["low"] < 1 < many["high"]
    assert many["high"] - many["low"] < 0.5 * (few["high"] - few["low"])
    assert timer.compute_interval(values) == many
    # The median's standard error is 1.25 sigma / sqrt(n), of which the interval has 3.92.
    assert many["high"] - many["low"] == pytest.approx(3.92 * 0.125 / 300**0.5, rel=0.3)


def test_ceilings_are_a_machine_s(monkeypatch):
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
def test_values_that_mean_nothing_are_refused(words, said, capsys):
    try:
        code = bench.main(["--device", "cpu", *words])
    except SystemExit as ended:
        code = ended.code
    assert code == 2
    assert said in capsys.readouterr().err


def test_a_report_of_a_broken_file_is_refused_in_one_line(tmp_path, capsys):
    (tmp_path / "linear.jsonl").write_text("{}\n")
    assert bench.main(["report", str(tmp_path)]) == 2
    assert "linear.jsonl, line 1: expected a line of results" in capsys.readouterr().err


def test_a_broken_file_is_named(tmp_path):
    file = tmp_path / "linear.jsonl"
    file.write_text('{"case": "a", "status": "ok"}\n{"case": \n')
    with pytest.raises(ValueError, match=r"linear.jsonl, line 2: expected JSON"):
        lines.read(file)
    file.write_text("[1]\n")
    with pytest.raises(ValueError, match="line 1: expected a line of results"):
        lines.read(file)


def test_without_rich_the_tables_are_plain(monkeypatch, capsys):
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


def test_outside_a_checkout_the_command_says_where_benchmarks_are(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(cli.fastlora, "__file__", str(tmp_path / "fastlora" / "__init__.py"))
    assert cli.main(["bench", "--list"]) == 2
    assert "benchmarks come with the sources" in capsys.readouterr().err


def test_the_commit_names_what_was_changed(monkeypatch, tmp_path):
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


def test_a_case_that_is_asked_for_by_name_need_not_be_quick():
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
