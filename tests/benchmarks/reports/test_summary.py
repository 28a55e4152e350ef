"""The tables of README.md and docs/results.md match the stored results."""

from pathlib import Path

import pytest

from benchmarks import RESULTS, ROOT
from benchmarks.reports import summary

ZEN4 = RESULTS / "cpu" / "amd-epyc-avx512_bf16"
INTEL = RESULTS / "cpu" / "intel-xeon-processor-amx_bf16-amx"
FOLDERS = [ZEN4 / name for name in ("1-thread", "2-threads")]
BOTH = [*FOLDERS, *(INTEL / name for name in ("1-thread", "2-threads"))]
evidence = pytest.mark.skipif(
    not all((folder / "linear.jsonl").exists() for folder in BOTH),
    reason="the results are in the repository, not in a source distribution",
)


@evidence
@pytest.mark.parametrize(
    "arguments",
    [[*BOTH, "--headlines"], FOLDERS, BOTH[2:]],
    ids=["headlines", "all on AMD", "all on Intel"],
)
def test_results_page_shows_tables_of_the_evidence(arguments, capsys):
    assert summary.main([*map(str, arguments)]) == 0
    table = capsys.readouterr().out
    assert table.count("\n") > 10
    assert table in (ROOT / "docs/results.md").read_text()


@evidence
def test_readme_shows_five_of_the_headlines():
    lines = (ROOT / "README.md").read_text().splitlines()
    first = next(i for i, ln in enumerate(lines) if ln.startswith("| fastlora's time over |"))
    rows = lines[first : lines.index("", first)]
    assert len(rows) == 7
    amd, intel = ([summary.read(f) for f in folders] for folders in (FOLDERS, BOTH[2:]))
    headlines = summary.make_headlines(amd, intel, names=("AMD", "Intel"))
    assert set(rows) <= set(headlines.splitlines())


@evidence
@pytest.mark.parametrize("folders", [FOLDERS, BOTH[2:]], ids=["AMD", "Intel"])
def test_every_headline_has_a_measurement(folders):
    found = [summary.read(folder) for folder in folders]
    rows = summary.make_headlines(found).splitlines()[2:]
    assert not any("-" in row.split() for row in rows)
    for (case, provider), line in found[0].items():
        row = next(r for r in summary.make_table(found).splitlines() if r.startswith(f"| {case} |"))
        if provider in summary.NAMED:
            assert f"{line['ratio']['p50']:.2f}" in row


def test_summary_refuses_folder_without_results(tmp_path: Path, capsys):
    assert summary.main([str(tmp_path)]) == 2
    assert "expected results in" in capsys.readouterr().err


def test_headline_is_bold_where_intervals_are_disjoint():
    def line(low: float, p50: float, high: float) -> dict:
        return {"ratio": {"low": low, "p50": p50, "high": high}}

    case = summary.HEADLINES[0][1]
    found = {(case, "fastlora"): line(0.85, 0.9, 0.95), (case, "base"): line(1, 1, 1)}
    found |= {(case, "torch"): line(1.7, 1.8, 1.9), (case, "torch-gather"): line(1.1, 1.2, 1.3)}
    found |= {(case, "peft"): line(0.94, 1.0, 1.1)}
    row = summary.make_headlines([found]).splitlines()[2]
    assert row.split(" | ")[1:] == ["**0.90**", "**0.75**", "0.90 |"]


def test_summary_lists_limits_in_order_of_folders():
    def found(limit: float) -> dict:
        ratio = {"low": 1, "p50": 1, "high": 1}
        return {
            ("c", name): {"ratio": ratio, "ms": ratio, "limit": limit}
            for name in ("base", "fastlora")
        }

    assert summary.make_table([found(1.3), found(1.19)]).endswith("| 1.30 / 1.19 |")
    assert summary.make_table([found(1.3), found(1.3)]).endswith("| 1.30 |")
