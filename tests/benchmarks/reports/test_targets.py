"""Targets are met, missed, within noise or not measured, by the measured lines."""

from __future__ import annotations

import json
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from benchmarks import cases
from benchmarks.reports import targets
from benchmarks.reports.target_list import TARGETS, Target

CASE = "linear-forward-bf16-M8192-K4096-N4096-R16"
ROOT = Path(__file__).resolve().parents[3]


def target(bound: float, measure: str = "ratio", over: str = "base", **options) -> Target:
    given = {"device": "cuda", "cases": ("linear-*",), "ours": ("ours",), **options}
    return Target(work="work", bound=bound, because="so it is", over=over, measure=measure, **given)


def line(provider: str, p50: float, low: float, high: float, **fields) -> dict:
    ratio = {"p50": p50, "low": low, "high": high, "p20": low, "p80": high}
    return {
        "suite": "linear", "case": CASE, "device": "cuda", "provider": provider, "status": "ok",
        "ratio": ratio, "limit": 1.25, "gbps": 1000 / p50, "ceilings": {"bandwidth": 1e12},
    } | fields  # fmt: skip


BASE = line("base", 1.0, 1.0, 1.0)


def result(wanted: Target, *found: dict) -> tuple[str, str]:
    work, _, measured, verdict = targets.make_row(wanted, [BASE, *found])
    assert work == "work"
    return measured, verdict


def test_upper_bound_is_met_missed_or_within_noise():
    assert result(target(1.1), line("ours", 1.05, 1.04, 1.1)) == ("1.050 (1.040 to 1.100)", "met")
    assert result(target(1.1), line("ours", 1.15, 1.11, 1.2))[1] == "missed by 0.050"
    assert result(target(1.1), line("ours", 1.05, 1.04, 1.11))[1] == "within noise"
    assert result(target(1.1), line("ours", 1.12, 1.1, 1.13))[1] == "within noise"


def test_target_counts_the_best_of_our_providers():
    both = line("ours", 1.3, 1.29, 1.31), line("other", 1.05, 1.04, 1.06)
    assert result(target(1.1, ours=("ours", "other")), *both) == (
        "1.050 (1.040 to 1.060) by other",
        "met",
    )


def test_ratio_interval_includes_noise_of_both_providers():
    ours, torch = line("ours", 1.2, 1.1, 1.3), line("torch", 1.5, 1.4, 1.6)
    assert result(target(1.0, over="torch"), ours, torch) == ("0.800 (0.688 to 0.929)", "met")
    measured, verdict = result(target(1.4, "times", "torch"), ours, torch)
    assert (measured, verdict) == ("1.2x (1.1x to 1.5x)", "within noise")
    assert result(target(2, "times", "torch"), ours, torch)[1] == "missed by 0.8x"
    assert result(target(1.05, "times", "torch"), ours, torch)[1] == "met"


def test_limit_target_uses_the_limit_of_its_case():
    assert result(target(1.1, "limit"), line("ours", 1.35, 1.3, 1.37))[1] == "met"
    assert result(target(1.1, "limit"), line("ours", 1.5, 1.4, 1.6)) == (
        "1.200 (1.120 to 1.280)",
        "missed by 0.100",
    )


def test_bandwidth_target_is_a_lower_bound():
    assert result(target(0.85, "bandwidth"), line("ours", 1.1, 1.0, 1.15))[1] == "met"
    measured, verdict = result(target(0.85, "bandwidth"), line("ours", 1.25, 1.2, 1.4))
    assert measured == "0.800 (0.714 to 0.833)"
    assert verdict == "missed by 0.050"


def test_target_shows_the_worst_of_several_cases():
    one, two, three = (f"linear-{name}" for name in "xyz")
    found = [
        line(provider, *values, case=case)
        for case, values in ((one, (1.0, 1.0, 1.0)), (two, (1.3, 1.2, 1.4)), (three, (1.2,) * 3))
        for provider in ("ours", "base")
    ]
    for each in found:
        if each["provider"] == "base":
            each["ratio"] = BASE["ratio"]
    assert result(target(1.1, cases=("linear-?",)), *found) == (
        "1.300 (1.200 to 1.400), worst of 3: linear-y",
        "missed by 0.200, 2 of 3",
    )
    assert result(target(1.3, cases=("linear-?",)), *found)[1] == "within noise"


def test_target_gives_reason_when_not_measured():
    failed = line("ours", 1, 1, 1, status="failed", reason="y: error 1 over 0.1")
    del failed["ratio"]
    assert result(target(1.1), failed) == (
        "", f"not measured: {CASE}: failed: y: error 1 over 0.1",
    )  # fmt: skip
    assert result(target(1.1)) == ("", f"not measured: {CASE}: no such provider")
    assert result(target(1.1, cases=("multi-*",))) == ("", "not measured")
    assert result(target(1.1, device="cpu")) == ("", "not measured")
    died = {"case": "linear-x", "device": "cuda", "provider": None, "status": "timeout"}
    well = line("ours", 1.0, 1.0, 1.0)
    assert result(target(1.1), died, well)[1] == "met, 1 without"


def test_every_target_names_existing_cases_and_providers():
    listed = {"cuda": cases.CUDA, "cpu": cases.CPU}
    for wanted in TARGETS:
        if wanted.cases == ("model-generate-*",) and "model" not in {c.suite for c in cases.CPU}:
            continue
        found = [
            case
            for case in listed[wanted.device]
            if any(fnmatchcase(case.name, glob) for glob in wanted.cases)
        ]
        assert found, wanted.work
        for case in found:
            assert {*wanted.ours, wanted.over} <= case.providers.keys(), (wanted.work, case.name)
    assert len({wanted.work for wanted in TARGETS}) == len(TARGETS)


def test_targets_command_prints_table_of_folder(tmp_path, capsys):
    lines = [BASE, line("fastlora", 1.0, 0.99, 1.01), line("torch", 1.2, 1.19, 1.21)]
    (tmp_path / "linear.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    assert targets.main([str(tmp_path)]) == 0
    plain = capsys.readouterr().out
    (of_it,) = (r for r in plain.splitlines() if r.startswith("forward over unfused torch"))
    assert of_it.split("  ")[-1] == "met"
    assert "prefill 8 x 128" not in plain  # a CPU's
    assert targets.main([str(tmp_path), "--markdown"]) == 0
    heading, rule, *rows = capsys.readouterr().out.splitlines()
    assert heading == "| work | target | measured | result | because |"
    assert {text.count("|") for text in (heading, rule, *rows)} == {6}

    assert targets.main([str(tmp_path / "nowhere")]) == 2
    assert "expected results such as linear.jsonl" in capsys.readouterr().err
    (tmp_path / "linear.jsonl").write_text("no JSON")
    assert targets.main([str(tmp_path)]) == 2


@pytest.mark.parametrize("threads", ["1-thread", "2-threads"])
def test_stored_cpu_results_match_the_targets_table(threads, capsys):
    folder = ROOT / "benchmarks" / "results" / "cpu" / "amd-epyc-avx512_bf16" / threads
    assert targets.main([str(folder)]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 1 + sum(wanted.device == "cpu" for wanted in TARGETS)
    assert sum("not measured" in row for row in rows) <= 1
