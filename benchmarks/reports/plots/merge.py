"""Bandwidth of merging: bytes that cannot be avoided over the time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.harness.case import BASE
from benchmarks.harness.lines import Line
from benchmarks.reports.comparison import OURS, group_by_case
from benchmarks.reports.plots import style as ps

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Inches.
_LEFT, _BETWEEN, _RIGHT = 1.35, 1.5, 0.2
_BAR, _OVER, _UNDER = 0.27, 0.32, 0.5
_COLUMNS = 2


def write(folder: Path, timed: Sequence[Line], where: str) -> list[ps.Picture]:
    """Draws ``merge-bandwidth.png``, where the lines have a merge."""
    from matplotlib.lines import Line2D

    cases = {
        case: [
            provider_lines[name]
            for name in ps.sort_providers(n for n in provider_lines if n is not None)
        ]
        for case, provider_lines in group_by_case(
            line for line in timed if line["suite"] == "merge"
        ).items()
    }
    if not cases:
        return []
    columns = min(_COLUMNS, len(cases))
    bars = list(map(len, cases.values()))
    # A row is as high as its case with the most bars.
    rows = [
        max(bars[i : i + columns]) * _BAR + _OVER + _UNDER for i in range(0, len(bars), columns)
    ]
    foot = ps.measure_legend(1)
    subtitle = (
        "each byte of W once in each direction, over the median time · thin bars: p20 to p80 · "
        "higher is faster"
    )
    heading = ps.measure_heading(subtitle)
    height = heading + sum(rows) + foot
    figure = ps.make_figure(height, f"merge: bandwidth reached, {where}", subtitle)
    width = (ps.WIDTH - _LEFT - _RIGHT - (columns - 1) * _BETWEEN) / columns
    furthest = max(
        max(_fastest(line), _ceiling(line))
        for provider_lines in cases.values()
        for line in provider_lines
    )
    for number, (case, provider_lines) in enumerate(cases.items()):
        row, column = divmod(number, columns)
        plot = len(provider_lines) * _BAR
        below = height - heading - sum(rows[:row]) - _OVER - plot
        axes = ps.add_axes(figure, _LEFT + column * (width + _BETWEEN), below, width, plot)
        axes.set_title(case, size=ps.FONT, loc="left", color=ps.INK)
        _bars(axes, provider_lines, furthest)
    ceiling = Line2D([], [], color=ps.INK, linestyle="--", linewidth=1.4)
    ceiling.set_label("ceiling: the better of a copy's and a sum's bandwidth, same run")
    ps.add_legend(figure, [ceiling], foot)
    path = folder / "merge-bandwidth.png"
    ps.save(figure, path)
    return [ps.Picture("merge", path, f"merging: GB/s beside the ceiling, {where}")]


def _fastest(line: Line) -> float:
    """Returns GB/s of the fifth of its rounds that was fastest."""
    return line["bytes"] / line["ms"]["p20"] / 1e6


def _ceiling(line: Line) -> float:
    """Returns GB/s, 0 where it was not measured."""
    return (line.get("ceilings") or {}).get("bandwidth", 0.0) / 1e9


def _bars(axes: Axes, lines: Sequence[Line], furthest: float) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.grid(visible=False)
    axes.set_xlim(0, furthest * 1.55)
    ticks = MaxNLocator(5).tick_values(0, furthest)
    axes.set_xticks([tick for tick in ticks if tick <= furthest * 1.02])
    axes.spines["bottom"].set_bounds(0, furthest * 1.02)
    axes.set_ylim(len(lines) - 0.5, -0.5)
    names = ["copy (base)" if line["provider"] == BASE else line["provider"] for line in lines]
    axes.set_yticks(range(len(lines)), names)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("GB/s", size=ps.FONT, x=0.5 / 1.55)
    ceiling = _ceiling(lines[0])
    for y, line in enumerate(lines):
        style, value = ps.choose_style(line["provider"]), line["gbps"]
        ends = (line["bytes"] / line["ms"]["p80"] / 1e6, _fastest(line))
        axes.barh(y, value, 0.62, color=style.colour, alpha=1 if style.filled else 0.75, zorder=2)
        axes.hlines(y, *ends, color="#999999" if style.colour == "#000000" else "#333333",
                    linewidth=1.2, zorder=3)  # fmt: skip
        ours = line["provider"] == OURS
        if ours:
            axes.get_yticklabels()[y].set_fontweight("bold")
        # In a column of their own, where no bar and no line is.
        label = f"{value:.0f}" if value >= 100 else f"{value:.3g}"
        label += f" ({100 * value / ceiling:.0f} %)" if ceiling else ""
        weight = "bold" if ours else "normal"
        axes.text(furthest * 1.05, y, label, va="center", size=ps.FONT, color=ps.INK, weight=weight)
    if ceiling:
        axes.axvline(ceiling, color=ps.INK, linestyle="--", linewidth=1.4, zorder=4)
