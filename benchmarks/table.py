"""Lines of results as plain text."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.one import Line
from benchmarks.work import BASE

_WIDTHS = {
    "provider": 18,
    "ms": 10,
    "cpu ms": 10,
    "/ base": 8,
    "limit": 7,
    "p20 to p80": 15,
    "cpu/base": 9,
    "TFLOP/s": 9,
    "GB/s": 8,
    "error / bound": 15,
}
_PEERS = ("torch", "peft", "fastlora")


def rows(lines: Sequence[Line]) -> str:
    """One case: a heading, and a row for every provider."""
    return "\n".join([_row(list(_WIDTHS)), *(_of(line) for line in lines)])


def markdown(lines: Sequence[Line]) -> str:
    """One row a case: the base's time, and everyone else's ratio to it."""
    by_case: dict[str, dict[str, Line]] = {}
    for line in lines:
        by_case.setdefault(line["case"], {})[line["provider"] or "process"] = line
    found_at_all = {name for found in by_case.values() for name in found}
    others = [name for name in _PEERS if name in found_at_all]
    others += sorted(found_at_all.difference(others, [BASE]))
    table = [["case", "base, ms", *others], ["---"] * (len(others) + 2)]
    for case, found in by_case.items():
        cells = (_ratio(found[name]) if name in found else "" for name in others)
        table.append([case, f"{found[BASE]['ms']['p50']:.2f}" if BASE in found else "", *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in table)


def _ratio(line: Line) -> str:
    return f"{line['ratio']['p50']:.2f}" if "ratio" in line else line["status"]


def _of(line: Line) -> str:
    if "ms" not in line:
        return _row((line["provider"] or "process", f"{line['status']}: {line['reason']}"))
    ratio = line.get("ratio", {})
    return _row(
        (
            line["provider"],
            f"{line['ms']['p50']:.4g}",
            f"{line['cpu_ms']['p50']:.4g}",
            f"{ratio['p50']:.3f}" if ratio else "-",
            f"{line['limit']:.3f}" if line.get("limit") else "-",
            f"{ratio['p20']:.3f} to {ratio['p80']:.3f}" if ratio else "-",
            f"{line['cpu_ratio']['p50']:.3f}" if ratio else "-",
            f"{line['tflops']:.3g}",
            f"{line['gbps']:.3g}",
            _worst(line),
        )
    )


def _worst(line: Line) -> str:
    """The output that comes nearest to its bound."""
    worst = max(line["gate"].values(), key=lambda g: g["error"] / g["bound"])
    return f"{worst['error']:.1e} / {worst['bound']:.0e}"


def _row(cells: Sequence[str]) -> str:
    first, *rest = zip(cells, _WIDTHS.values(), strict=False)
    text = [f"{first[0]:<{first[1]}}", *(f"{cell:>{width}}" for cell, width in rest)]
    return "  " + " ".join(text).rstrip()
