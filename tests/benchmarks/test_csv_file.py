"""Results written as CSV keep every field and the order of columns."""

import csv

import pytest

from benchmarks.harness import csv_file
from tests.benchmarks.result_lines import line, not_timed, write_lines


def test_csv_has_every_field_of_every_line(tmp_path):
    lines = [
        *(line("base"), line("fastlora", 0.1, 1 / 3, 0.7, versions={"torch": "2, 13"})),
        not_timed("peft", "absent", 'says "no",\nthen dies'),
        not_timed(None, "crashed", "signal SIGSEGV"),
    ]
    path = csv_file.write_csv(write_lines(tmp_path, *lines) / "linear.jsonl")
    assert path == tmp_path / "linear.csv"
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(lines)
    for row, each in zip(rows, lines, strict=True):
        fields = csv_file.flatten(each)
        assert {k: v for k, v in row.items() if v} == {
            k: str(v) for k, v in fields.items() if v is not None
        }
    assert rows[1]["ratio.p50"] == repr(1 / 3)
    assert rows[1]["shape.K"] == "64"
    assert rows[1]["gate.y.bound"] == "0.004"
    assert rows[1]["ceilings.flops.bf16"] == "370000000000.0"
    assert rows[2]["ms.p50"] == rows[3]["provider"] == ""
    assert sorted(p.name for p in tmp_path.iterdir()) == ["linear.csv", "linear.jsonl"]


def test_csv_columns_keep_their_order():
    full = csv_file.order_columns([csv_file.flatten(line("base", further={"b": 1, "a": 2}))])
    poor = csv_file.order_columns([csv_file.flatten(not_timed(None, "crashed", "-"))])
    assert [name for name in full if name in poor] == poor
    assert full[:4] == ["suite", "case", "provider", "status"]
    assert full[-2:] == ["further.a", "further.b"]
    assert {"ratio.low", "limit", "share", "peak_bytes"} < set(poor)
    assert len(set(full)) == len(full)


def test_write_csv_refuses_missing_results(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"expected a file of results, found none at .*x\.j"
    ):
        csv_file.write_csv(tmp_path / "x.jsonl")
