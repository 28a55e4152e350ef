"""Cells and tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def table(heading: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """left: how many columns hold words; figures stand to the right."""
    rule = ["---"] * left + ["---:"] * (len(heading) - left)
    return "\n".join(f"| {' | '.join(row)} |" for row in (heading, rule, *rows))


def bullets(items: Iterable[str]) -> str:
    return "\n".join(f"- {item}" for item in items)


def said(reason: str | None, longest: int | None = 300) -> str:
    """What a program said, in one line that breaks no table. longest: characters of it."""
    words = " ".join(str(reason or "no reason given").split()).replace("|", "\\|")
    return words if longest is None or len(words) <= longest else words[: longest - 1] + "…"


def figure(value: float) -> str:
    """A ratio: three decimals where a percent matters."""
    return f"{value:.3f}" if value < 2 else f"{value:.2f}" if value < 10 else f"{value:.1f}"


def ratio(line: Mapping[str, Any] | None) -> str:
    """The median and its interval; milliseconds where there is no base; else what became of it."""
    if not line:
        return "-"
    found = line.get("ratio")
    if not found:
        return f"{ms(line)} ms" if "ms" in line else line["status"]
    middle = figure(found["p50"])
    if "low" not in found:
        return middle
    return f"{middle} ({figure(found['low'])} to {figure(found['high'])})"


def ms(line: Mapping[str, Any] | None) -> str:
    """The median time, of a provider that was timed."""
    if not line:
        return "-"
    return f"{line['ms']['p50']:.4g}" if "ms" in line else line["status"]


def share(line: Mapping[str, Any]) -> str:
    return f"{100 * line['share']:.0f} %" if line.get("share") else "-"


def span(values: Iterable[float], digits: int = 3) -> str:
    """The least to the greatest."""
    found = sorted(values)
    low, high = (f"{value:.{digits}g}" for value in (found[0], found[-1]))
    return low if low == high else f"{low} to {high}"
