"""Tables of text of one case's lines."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.harness.lines import Line

HEADING = (
    "provider", "ms", "/ base", "95 %", "p20 to p80", "limit", "share", "peak MB", "cpu/base",
    "TFLOP/s", "GB/s", "error / bound",
)  # fmt: skip


def make_rows(lines: Sequence[Line]) -> list[list[str]]:
    """Makes a row under ``HEADING`` for every provider that was timed."""
    return [_make_row(line) for line in lines if "ms" in line]


def make_notes(lines: Sequence[Line]) -> list[str]:
    """Says why the others were not timed."""
    untimed = (line for line in lines if "ms" not in line)
    return [f"{ln['provider'] or 'process'}: {ln['status']}: {ln['reason']}" for ln in untimed]


def format_plain(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligns columns, the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(heading, *rows, strict=True)]

    def align(cells: Sequence[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        text = [f"{first[0]:<{first[1]}}", *(f"{cell:>{width}}" for cell, width in others)]
        return "  " + "  ".join(text).rstrip()

    return "\n".join(map(align, (heading, *rows)))


def _make_row(line: Line) -> list[str]:
    ratio = line.get("ratio")
    return [
        line["provider"],
        f"{line['ms']['p50']:.4g}",
        f"{ratio['p50']:.3f}" if ratio else "-",
        f"{ratio['low']:.3f} to {ratio['high']:.3f}" if ratio else "-",
        f"{ratio['p20']:.3f} to {ratio['p80']:.3f}" if ratio else "-",
        f"{line['limit']:.3f}" if ratio else "-",
        f"{line['share']:.0%}",
        f"{line['peak_bytes'] / 1e6:.3g}",
        f"{line['cpu_ratio']['p50']:.3f}" if ratio else "-",
        f"{line['tflops']:.3g}",
        f"{line['gbps']:.3g}",
        _format_worst(line),
    ]


def _format_worst(line: Line) -> str:
    """Formats the error of the output that comes nearest to its bound."""
    worst = max(line["gate"].values(), key=lambda g: g["error"] / g["bound"])
    return f"{worst['error']:.1e} / {worst['bound']:.0e}"
