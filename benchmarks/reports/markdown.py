"""Cells and tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def make_table(heading: Sequence[str], rows: Iterable[Sequence[str]], word_columns: int = 1) -> str:
    """Makes a table. word_columns: how many columns hold words; figures stand to the right."""
    rule = ["---"] * word_columns + ["---:"] * (len(heading) - word_columns)
    return "\n".join(f"| {' | '.join(row)} |" for row in (heading, rule, *rows))


def make_bullets(items: Iterable[str]) -> str:
    return "\n".join(f"- {item}" for item in items)


def shorten(reason: str | None, longest: int | None = 300) -> str:
    """Puts a program's output in one line that breaks no table, of ``longest`` characters."""
    words = " ".join(str(reason or "no reason given").split()).replace("|", "\\|")
    return words if longest is None or len(words) <= longest else words[: longest - 1] + "…"


def format_figure(value: float) -> str:
    """Formats a ratio: three decimals where a percent matters."""
    return f"{value:.3f}" if value < 2 else f"{value:.2f}" if value < 10 else f"{value:.1f}"


def format_ratio(line: Mapping[str, Any] | None) -> str:
    """Formats the median and its interval; milliseconds without a base; else the status."""
    if not line:
        return "-"
    ratio = line.get("ratio")
    if not ratio:
        return f"{format_ms(line)} ms" if "ms" in line else line["status"]
    middle = format_figure(ratio["p50"])
    if "low" not in ratio:
        return middle
    return f"{middle} ({format_figure(ratio['low'])} to {format_figure(ratio['high'])})"


def format_ms(line: Mapping[str, Any] | None) -> str:
    """Formats the median time of a provider that was timed; else its status."""
    if not line:
        return "-"
    return f"{line['ms']['p50']:.4g}" if "ms" in line else line["status"]


def format_share(line: Mapping[str, Any]) -> str:
    return f"{100 * line['share']:.0f} %" if line.get("share") else "-"


def format_span(values: Iterable[float], digits: int = 3) -> str:
    """Formats the least to the greatest."""
    ordered = sorted(values)
    low, high = (f"{value:.{digits}g}" for value in (ordered[0], ordered[-1]))
    return low if low == high else f"{low} to {high}"
