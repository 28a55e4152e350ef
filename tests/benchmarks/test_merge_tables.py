"""The script behind the tables of docs/merging.md runs at a small size."""

import pytest

from benchmarks.tables import merging as merge_tables


@pytest.mark.parametrize("table, rows", [("receipt", 3), ("fidelity", 6), ("combine", 5)])
def test_merge_tables_prints_each_table(table, rows, capsys):
    if table == "combine":
        pytest.importorskip("peft", reason="PEFT is not installed")
    merge_tables.main([table, "--size", "64"])
    machine, heading, rule, *body = capsys.readouterr().out.splitlines()
    assert "torch" in machine
    assert len(body) == rows
    assert {line.count(" | ") for line in (heading, *body)} == {rule.count("-|-")}
