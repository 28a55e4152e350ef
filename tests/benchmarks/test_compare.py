"""`fastlora bench --compare` finds a slowdown and ignores noise."""

import pytest
import torch

from benchmarks.harness import lines, measurement, runner, terminal, timer
from benchmarks.reports import compare


def slow_down(line: lines.Line, by: float, *providers: str) -> lines.Line:
    if line["provider"] not in providers:
        return line
    return {**line, "ratio": {k: by * v for k, v in line["ratio"].items()}}


def ratio_lines(**ratios: float) -> list[lines.Line]:
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


def test_list_changes_finds_slowdown_but_ignores_noise():
    before = ratio_lines(torch=1.2, fastlora=1.1, peft=1.3)

    def judged(**now: float) -> bool:
        (change,) = compare.list_changes(ratio_lines(**now), before)
        return change.slower

    assert judged(torch=1.2, fastlora=1.65)
    assert judged(torch=1.15, fastlora=1.6)
    assert not judged(torch=1.2, fastlora=1.3)
    # The base was quick, or torch slow: not ours.
    assert not judged(torch=1.8, fastlora=1.65)
    assert not judged(torch=0.8, fastlora=1.15)
    elsewhere = [
        {**line, "device_name": "another"} for line in ratio_lines(torch=1.2, fastlora=3.0)
    ]
    (change,) = compare.list_changes(elsewhere, before)
    assert not change.slower
    assert "another device" in compare.make_table([change])[1][0]


def test_bench_compare_fails_on_slower_run(bench_in_process, tmp_path, capsys):
    """Earlier results that say ours was twice as fast; the run finds it slow three times."""
    _, found = bench_in_process()
    honest, faster = tmp_path / "honest.jsonl", tmp_path / "faster.jsonl"
    for line in found:
        lines.write(line, honest)
        lines.write(slow_down(line, 1 / 20, "fastlora"), faster)
    assert bench_in_process("--compare", str(faster))[0] == 1
    said = capsys.readouterr()
    assert "slower each of 3 times: linear-forward-fp32-M4-K32-N48-R4" in said.out
    assert "not everything passed" in said.err
    generous = tmp_path / "slower.jsonl"
    for line in found:
        lines.write(slow_down(line, 20, "fastlora"), generous)
    assert bench_in_process("--compare", str(generous))[0] == 0


@pytest.mark.full  # a run that is slower is quick
def test_bench_compare_fails_when_second_measurement_crashes(
    bench_in_process, tmp_path, monkeypatch
):
    _, found = bench_in_process()
    earlier = tmp_path / "earlier.jsonl"
    for line in found:
        lines.write(slow_down(line, 1 / 20, "fastlora"), earlier)
    runs, run = [], runner.run

    def crashing(*args):
        runs.append(1)
        return run(*args) if len(runs) == 1 else False

    monkeypatch.setattr(runner, "run", crashing)
    assert bench_in_process("--compare", str(earlier))[0] == 1


@pytest.mark.full  # a run that is slower is quick
def test_bench_compare_ignores_lines_of_another_device(bench_in_process, tmp_path, capsys):
    _, found = bench_in_process()
    earlier = tmp_path / "earlier.jsonl"
    for line in found:
        lines.write({**slow_down(line, 1 / 20, "fastlora"), "device_name": "another"}, earlier)
    assert bench_in_process("--compare", str(earlier))[0] == 0
    assert "nothing was judged" in capsys.readouterr().out


@pytest.mark.full  # a run that is slower is quick
def test_bench_compare_repeats_measurement_of_slow_case(
    bench_in_process, tmp_path, monkeypatch, capsys
):
    """A run in which something else wanted the machine, and then a quiet one."""
    _, found = bench_in_process()
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
    assert bench_in_process("--compare", str(earlier))[0] == 0
    assert "slower, measured again: linear-forward" in capsys.readouterr().out
    assert len(runs) == 4


def test_compute_interval_holds_median_and_narrows():
    draw = torch.Generator().manual_seed(0)
    values = (1 + 0.1 * torch.randn(300, generator=draw)).tolist()
    few, many = timer.compute_interval(values[:10]), timer.compute_interval(values)
    assert few["low"] < timer.compute_spread(values[:10])["p50"] < few["high"]
    assert many["low"] < 1 < many["high"]
    assert many["high"] - many["low"] < 0.5 * (few["high"] - few["low"])
    assert timer.compute_interval(values) == many
    # The median's standard error is 1.25 sigma / sqrt(n), of which the interval has 3.92.
    assert many["high"] - many["low"] == pytest.approx(3.92 * 0.125 / 300**0.5, rel=0.3)
