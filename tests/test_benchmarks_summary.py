"""The tables of README.md and docs/results.md are those of the evidence in the repository."""

from pathlib import Path

import pytest

from benchmarks import RESULTS, ROOT
from benchmarks.reports import summary

FOLDERS = [RESULTS / "cpu" / name for name in ("1-thread", "2-threads")]
evidence = pytest.mark.skipif(
    not all((folder / "linear.jsonl").exists() for folder in FOLDERS),
    reason="the results are in the repository, not in a source distribution",
)


@evidence
@pytest.mark.parametrize("page, how", [("README.md", ["--headlines"]), ("docs/results.md", [])])
def test_a_page_shows_what_was_measured(page, how, capsys):
    assert summary.main([*map(str, FOLDERS), *how]) == 0
    table = capsys.readouterr().out
    assert table.count("\n") > 10
    assert table in (ROOT / page).read_text()


@evidence
def test_every_headline_was_measured():
    found = [summary.read(folder) for folder in FOLDERS]
    rows = summary.headlines(found).splitlines()[2:]
    assert not any("-" in row.split() for row in rows)
    for (case, provider), line in found[0].items():
        row = next(r for r in summary.table(found).splitlines() if r.startswith(f"| {case} |"))
        if provider in summary.NAMED:
            assert f"{line['ratio']['p50']:.2f}" in row


def test_a_folder_without_results_is_refused(tmp_path: Path, capsys):
    assert summary.main([str(tmp_path)]) == 2
    assert "expected results in" in capsys.readouterr().err
