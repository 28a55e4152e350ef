"""The report states wins, losses, missing providers and runs as the lines have them."""

import re
import sys

import pytest

from benchmarks.reports import comparison, plots, provenance, report
from tests.benchmarks.result_lines import CASE, line, not_timed, write_lines


def section(text: str, heading: str) -> str:
    """From a heading to the next of its level."""
    return text.split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]


@pytest.fixture
def no_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)


@pytest.mark.parametrize(
    "torch, outcome",
    [
        ((0.80, 0.9, 0.99), comparison.LOSES),
        ((0.80, 0.9, 1.00), comparison.EVEN),  # the intervals touch
        ((0.90, 1.1, 1.30), comparison.EVEN),
        ((1.20, 1.3, 1.40), comparison.EVEN),
        ((1.21, 1.3, 1.40), comparison.WINS),
    ],
)
def test_compare_all_decides_only_where_intervals_are_disjoint(torch, outcome):
    ours = line("fastlora", 1.0, 1.1, 1.2)
    (found,) = comparison.compare_all([line("base"), line("torch", *torch), ours])
    assert found.outcome == outcome


def test_case_is_won_only_against_every_peer():
    lines = [line("fastlora"), line("torch", 1.0, 1.1, 1.2), line("peft", 2.0, 2.0, 2.0)]
    (found,) = comparison.compare_all(lines)
    assert {pair.outcome for pair in found.pairs} == {comparison.WINS, comparison.EVEN}
    assert found.outcome == comparison.EVEN
    assert CASE in section(report.write_text(lines), "Too close to call")


def test_report_sorts_losses_by_factor():
    near, far = CASE.replace("M1", "M16"), CASE.replace("M1", "M512")
    text = report.write_text(
        [
            *(line("base", case=case) for case in (near, far)),
            *(line("fastlora", 1.98, 2.0, 2.2, case=case) for case in (near, far)),
            *(line("torch", 1.5, 1.6, 1.65, case=near), line("peft", 2.5, 2.6, 2.7, case=near)),
            line("torch", 0.8, 1.0, 1.1, case=far),
        ]
    )
    rows = [row for row in section(text, "Where fastlora loses").splitlines() if CASE[:14] in row]
    assert rows == [
        f"| {far} | torch | 2.00 × | 1.80 × | 2.00 (1.980 to 2.20) | 1.000 (0.800 to 1.100) |",
        f"| {near} | torch | 1.25 × | 1.20 × | 2.00 (1.980 to 2.20) | 1.600 (1.500 to 1.650) |",
    ]
    assert "In 2 cases: fastlora is **slower than somebody in 2**" in text
    assert "## Where fastlora wins" not in text
    assert "| torch | 2 | 2 | 0 | 0 | 1.62 (1.25 to 2) |" in text
    assert "| peft | 1 | 0 | 0 | 1 | 0.77 |" in text


def test_report_shows_win_beside_the_fastest_peer():
    text = report.write_text(
        [
            *(line("base"), line("fastlora", 1.0, 1.0, 1.0)),
            *(line("torch", 1.4, 1.5, 1.6), line("vllm", 1.1, 1.2, 1.3)),
        ]
    )
    won = section(text, "Where fastlora wins")
    assert f"| {CASE} | vllm | 1.20 × | 1.10 × | 1.000 (1.000 to 1.000) |" in won
    assert "torch" not in won
    assert "Nowhere" in section(text, "Where fastlora loses")


def test_compare_all_ignores_providers_that_are_no_rivals():
    """The base does less, a merged weight was prepared, a prompt is no LoRA, the rest is ours."""
    others = ("base-compiled", "peft-prefix", "peft-prompt", "peft-patched", "torch-product")
    faster = [line(name, 0.1, 0.1, 0.1) for name in (*others, "merged", "two_pass")]
    (found,) = comparison.compare_all(
        [*faster, line("torch", 1.5, 1.5, 1.5), line("fastlora"), line("base")]
    )
    assert found.outcome == comparison.WINS
    assert [pair.other["provider"] for pair in found.merged] == ["merged"]
    assert [pair.other["provider"] for pair in found.paths] == ["torch-product", "two_pass"]
    lost = section(
        report.write_text([*faster, line("fastlora"), line("torch", 2, 2, 2)]),
        "Where fastlora loses",
    )
    assert "Nowhere" in lost
    assert re.search(
        r"merged into beforehand.*\| merged \| 10.00 ×.*own paths.*torch-product", lost, re.DOTALL
    )


def test_compare_all_pairs_compiled_with_compiled():
    names = ("fastlora", "fastlora-compiled", "torch", "torch-compiled")
    medians = (1.0, 0.5, 1.2, 0.8)
    lines = [line(n, m, m, m) for n, m in zip(names, medians, strict=True)]
    (found,) = comparison.compare_all(lines)
    beside = {pair.other["provider"]: pair.ours["provider"] for pair in found.pairs}
    assert beside == {"torch": "fastlora", "torch-compiled": "fastlora-compiled"}
    assert found.outcome == comparison.WINS
    (eager,) = comparison.compare_all([each for each in lines if each["provider"] != names[1]])
    assert eager.outcome == comparison.LOSES


@pytest.mark.parametrize(
    "lines, why",
    [
        ([line("base"), line("torch")], "no line of fastlora"),
        ([line("base"), line("fastlora")], "nobody else was timed in the same run"),
        ([line("torch", ratio=None), line("fastlora", ratio=None)], "the base was not timed"),
        ([line("torch"), not_timed("fastlora", "failed", "y: error")], "fastlora failed: y: error"),
        ([line("torch"), not_timed(None, "crashed", "signal SIGSEGV")], "crashed: signal SIGSEGV"),
        ([line("torch", seed=1), line("fastlora")], "nobody else was timed in the same run"),
        ([line("torch"), line("fastlora", ratio={"p50": 1.0})], "its ratio has no interval"),
    ],
)
def test_report_gives_reason_for_cases_not_compared(lines, why):
    text = report.write_text(lines)
    assert f"- `{CASE}`: {why}" in section(text, "Not compared")
    assert "In none of 1 case could fastlora be compared" in text
    assert "Nothing can be said" in section(text, "Where fastlora loses")


def test_report_table_has_times_ratios_limits_and_memory():
    lines = [line("base"), line("torch", 1.1, 1.2, 12.34), line("fastlora", 1.0, 1.25, 1.5)]
    lines += [line("peft", peak_bytes=None), line("two_pass", 1.3, 1.3, 1.3)]
    text = section(report.write_text(lines), "Suite linear")
    assert "| case | base, ms | fastlora | torch | peft | limit | fastlora's share |" in text
    cells = ["1.250 (1.000 to 1.500)", "1.200 (1.100 to 12.3)", "1.000 (1.000 to 1.000)"]
    assert f"| {CASE} | 2.5 | {' | '.join(cells)} | 1.010 | 40 % | 1.5, -, 1.5 |" in text
    assert f"| {CASE} | {cells[0]} | 1.300 (1.300 to 1.300) |" in text


def test_report_table_shows_times_without_a_base():
    lines = [not_timed("base", "failed", "y: error 1"), line("fastlora", ratio=None, limit=None)]
    text = section(report.write_text(lines), "Suite linear")
    assert f"| {CASE} | failed | 2.5 ms | - | 50 % |" in text


def test_report_names_providers_without_figures_and_reasons():
    other = CASE.replace("M1", "M2")
    text = report.write_text(
        [
            *(line("base"), line("base", case=other), line("torch"), line("fastlora")),
            *(not_timed("peft", "absent", "cannot be imported", c) for c in (CASE, other)),
            not_timed("torch", "error", "RuntimeError: a | b\nc", other),
            not_timed(None, "timeout", "killed after 9 s", other),
        ]
    )
    assert "- `peft` absent in all 2 cases: cannot be imported" in text
    assert rf"- `torch` error in `{other}`: RuntimeError: a \| b c" in text
    assert f"- `the case's process` timeout in `{other}`: killed after 9 s" in text
    assert f"- `{other}`: timeout: killed after 9 s" in section(text, "Not compared")


def test_report_lists_every_run_with_commit_and_ceilings():
    later = {
        "commit": "b" * 40 + "+changes",
        "timestamp": "2026-02-02T00:00:00+00:00",
        "ceilings": {"bandwidth": 3.3e10, "flops": {"bf16": 4e11}},
        "versions": {"fastlora": "0.1.0", "torch": "2.14.0", "peft": None},
        "clocks": {"load": 7.25, "mhz": 3100.0},
    }
    other = CASE.replace("M1", "M2")
    lines = [line("base", case=other, **later), line("base"), line("fastlora", quick=True)]
    text = section(report.write_text(lines), "Measured on")
    assert "figures are of 2 runs" in text
    assert (
        "| 1 | 2026-01-02 03:04 | aaaaaaaaaaaa | 1 | 32 | bf16 0.37 | load 0.5; 2600 MHz |" in text
    )
    assert "| 2 | 2026-02-02 00:00 | bbbbbbbbbbbb+changes | 1 | 33 | bf16 0.4 |" in text
    assert "| torch | 2.14.0, 2.13.0 |" in text
    assert "| not installed | peft |" in text
    assert "| cases measured in haste (`--quick`) | 1 |" in text
    assert "Method: as one does." in text
    one_run = section(report.write_text(lines[1:]), "Measured on")
    assert "runs" not in one_run


def test_report_accepts_only_lines_of_crashed_processes():
    text = report.write_text([not_timed(None, "crashed", "signal SIGSEGV: it said nothing")])
    assert text.startswith("# Benchmarks: unknown device")
    assert "no process lived to say so" in text
    assert f"| {CASE} | - | - | - | -, -, - |" in text


@pytest.mark.parametrize("device, said", [("cpu", "2 threads"), ("cuda", "2 host threads")])
def test_report_names_device_with_its_threads(device, said):
    assert provenance.name_devices([line("base", device=device)]) == f"Some CPU, {said}"


def test_report_refuses_folder_without_results(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected a folder of results, found none at .*x"):
        report.write(tmp_path / "x")
    with pytest.raises(FileNotFoundError, match="expected results such as"):
        report.write(tmp_path)
    write_lines(tmp_path)
    with pytest.raises(ValueError, match="found empty files in"):
        report.write(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["linear.jsonl"]


def test_report_says_when_matplotlib_is_missing(tmp_path, no_matplotlib):
    paths = report.write(write_lines(tmp_path, line("base"), line("fastlora"), line("torch")))
    assert paths == [tmp_path / "report.md"]
    text = paths[0].read_text()
    assert "**No pictures:** matplotlib cannot be imported" in text
    assert "pip install '.[bench]'" in text
    assert ".png" not in text
    with pytest.raises(plots.NoMatplotlib, match="bench"):
        plots.write(tmp_path, [line("base")])
