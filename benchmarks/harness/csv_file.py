"""Results as CSV: a row a line, nested fields as columns with dots."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.harness.lines import Line, read

_SPREAD = ("p20", "p50", "p80")
# Columns of every file, in this order, and under a name that ends in ".*" whatever there is below
# it, by name: a file's columns do not move when a case is added that has fewer fields than others.
_ORDER = (
    *("suite", "case", "provider", "status", "reason", "device", "device_name", "threads"),
    *("instruction_set", "backend", "dtype", "lora_dtype", "shape.*", "workload", "dropout"),
    *(f"ms.{q}" for q in _SPREAD),
    *(f"ratio.{q}" for q in (*_SPREAD, "low", "high")),
    *("limit", "share"),
    *(f"{clock}.{q}" for clock in ("cpu_ms", "cpu_ratio") for q in _SPREAD),
    *("flops", "bytes", "tflops", "gbps", "peak_bytes", "rounds", "calls", "copies", "clock"),
    *("quick", "gate.*", "ceilings.bandwidth", "ceilings.flops.*", "clocks.*"),
    *("timestamp", "seed", "commit", "versions.*", "method"),
)


def flatten(line: Mapping[str, Any], under: str = "") -> Line:
    """Returns the line without nesting: {"ms": {"p50": 1}} becomes {"ms.p50": 1}."""
    flat: Line = {}
    for name, value in line.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{under}{name}.")
        else:
            flat[under + name] = value
    return flat


def order_columns(rows: Iterable[Line]) -> list[str]:
    """Orders the columns: known ones, whether a line has them or not, then others by name."""
    remaining = sorted({name for row in rows for name in row})
    ordered = []
    for name in _ORDER:
        below = [n for n in remaining if n.startswith(name[:-1])] if name.endswith(".*") else [name]
        ordered += below
        remaining = [n for n in remaining if n not in below]
    return ordered + remaining


def format_csv(lines: Iterable[Line]) -> str:
    """Formats lines as CSV with a heading; what is missing or null is an empty cell."""
    rows = [flatten(line) for line in lines]
    out = io.StringIO()
    writer = csv.DictWriter(out, order_columns(rows), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def write_csv(jsonl: Path) -> Path:
    """Writes ``<suite>.csv`` beside ``<suite>.jsonl``, in one piece. Returns its path.

    Raises FileNotFoundError where there are no results, ValueError where a line is none.
    """
    if not jsonl.exists():
        raise FileNotFoundError(f"jsonl: expected a file of results, found none at {jsonl}")
    target = jsonl.with_suffix(".csv")
    new = target.with_suffix(".csv.new")
    new.write_text(format_csv(read(jsonl)), newline="")
    os.replace(new, target)
    return target
