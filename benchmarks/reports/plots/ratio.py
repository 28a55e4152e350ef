"""Ratio to the base over rows (M) and over adapters (S): a panel for each of what else differs.

Panels are as wide as they have places on their x-axis and fill rows, which share a y-axis: three
measured shapes make three narrow panels, thirty some wide ones. Providers stand side by side at a
place, so that no interval hides another's. What is far above fastlora stands at the upper edge
with its figure, or the differences that matter could not be seen.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.harness.case import BASE
from benchmarks.harness.lines import Line
from benchmarks.reports.comparison import OURS, name_work
from benchmarks.reports.plots import style as ps

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# The dimension along x, the first that a shape has, and its name on the axis.
_ALONG = {"S": "adapters S", "M": "rows M", "B": "sequences B"}

# Inches.
_LEFT, _RIGHT, _BETWEEN, _PLOT = 0.62, 0.1, 0.14, 1.75
_UNDER = 0.55
_SLOT, _AROUND, _NARROWEST, _NARROWEST_PLACE = 0.058, 0.16, 1.02, 0.5
_STRETCH = 2.5
_CHARACTERS = 14  # an inch of a panel's heading
_ROWS = 5  # in one picture; what does not fit goes to the next
# Of a y-axis that spans more than _FINE; a part of them, 1 among it.
_TICKS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1)
_TICKS += (1.1, 1.2, 1.3, 1.4, 1.6, 1.8, 2, 2.5, 3, 4, 5, 6, 8, 10, 15, 20, 30, 50, 100)
_FINE, _TICKS_AT_MOST = 1.5, 8
# Above so many times the greatest of fastlora and the limits in its row, figures stand at the edge.
_BEYOND = 2.0


@dataclass
class _Panel:
    along: str
    heading: dict[str, str]
    places: dict[int, dict[str, Line]]  # by x: providers' lines
    place: float  # inches

    stretched: float = 1.0

    @property
    def width(self) -> float:
        return self.stretched * max(_NARROWEST, len(self.places) * self.place)

    @property
    def lines(self) -> list[Line]:
        return [line for here in self.places.values() for line in here.values()]


def write(folder: Path, timed: Sequence[Line], where: str) -> list[ps.Picture]:
    """Draws a picture for each suite but ``merge``, or for each of its works where they are many.

    timed: lines with times.
    """
    suites: dict[str, list[Line]] = {}
    for line in timed:
        drawn = line["suite"] != "merge" and line["provider"] != BASE and line.get("ratio")
        if drawn and _along(line):
            suites.setdefault(line["suite"], []).append(line)
    written = []
    for suite, suite_lines in suites.items():
        works = {suite: suite_lines}
        if len(_layout(suite_lines)) > _ROWS:
            works = {}
            for line in suite_lines:
                works.setdefault(name_work(line), []).append(line)
        for work, its_lines in works.items():
            rows = _layout(its_lines)
            pages = [rows[first : first + _ROWS] for first in range(0, len(rows), _ROWS)]
            if len(rows) == 1:
                _stretch(rows[0])
            for number, page in enumerate(pages, 1):
                name = work if len(pages) == 1 else f"{work}-{number}"
                path = folder / f"{name}.png"
                _draw(path, page, f"{work}: time over the base's, {where}")
                written.append(ps.Picture(suite, path, f"{name}: ratio to the base, {where}"))
    return written


def _along(line: Line) -> str:
    return next((name for name in _ALONG if name in line["shape"]), "")


def _layout(lines: Sequence[Line]) -> list[list[_Panel]]:
    """Lays panels out in rows, in an order in which neighbours differ little."""
    panels: dict[tuple, _Panel] = {}
    providers = len({line["provider"] for line in lines})
    place = max(_NARROWEST_PLACE, providers * _SLOT + _AROUND)
    works = list(dict.fromkeys(map(name_work, lines)))
    for line in lines:
        (key, heading), along = _key(line), _along(line)
        panel = _Panel(along, heading, {}, place)
        panel = panels.setdefault((works.index(name_work(line)), key), panel)
        panel.places.setdefault(line["shape"][along], {})[line["provider"]] = line
    for panel in panels.values():
        panel.places = dict(sorted(panel.places.items()))
    return _rows(panels[key] for key in sorted(panels))


def _key(line: Line) -> tuple[tuple, dict[str, str]]:
    """Returns what separates and orders the panels of a work, and a panel's heading."""
    shape, mixed = line["shape"], "ranks_mixed" in line["case"]
    K, N, R = (shape.get(k, 0) for k in "KNR")
    dtype, lora_dtype = line["dtype"], line["lora_dtype"]
    other_sizes = {k: v for k, v in shape.items() if k not in (_along(line), *"KNR")}
    workload, dropout = line.get("workload") or "", line.get("dropout") or 0.0
    key = (
        dtype,
        lora_dtype != dtype,
        N,
        K,
        R,
        mixed,
        dropout,
        tuple(other_sizes.items()),
        workload,
    )
    heading = {
        "work": name_work(line).removeprefix(line["suite"] + "-"),
        "rows": " ".join(
            filter(None, (*(f"{k}\N{NO-BREAK SPACE}{v}" for k, v in other_sizes.items()), workload))
        ),
        "layer": f"{K} × {N}" if K and N else "",
        "rank": f"r 8 to {R}" if mixed else f"r {R}" if R else "",
        "dropout": f"dropout {dropout:g}" if dropout else "",
        "dtype": dtype if lora_dtype == dtype else f"{dtype}, A B {lora_dtype}",
    }
    return key, heading


def _rows(panels: Iterable[_Panel]) -> list[list[_Panel]]:
    """Fills rows with panels in their order, as many as there is room for."""
    rows: list[list[_Panel]] = []
    room = 0.0
    for panel in panels:
        if not rows or panel.width > room:
            rows.append([])
            room = ps.WIDTH - _LEFT - _RIGHT
        rows[-1].append(panel)
        room -= panel.width + _BETWEEN
    return rows


def _stretch(row: Sequence[_Panel]) -> None:
    """Stretches the panels of a single row to fill the picture, within bounds."""
    room = ps.WIDTH - _LEFT - _RIGHT - (len(row) - 1) * _BETWEEN
    for panel, width in [(panel, sum(p.width for p in row)) for panel in row]:
        panel.stretched = max(1.0, min(_STRETCH, room / width))


def _draw(path: Path, rows: list[list[_Panel]], title: str) -> None:
    from matplotlib.lines import Line2D

    panels = [panel for row in rows for panel in row]
    providers = ps.sort_providers(line["provider"] for panel in panels for line in panel.lines)
    # What all panels have in common is said once.
    common = [k for k in panels[0].heading if len({panel.heading[k] for panel in panels}) == 1]
    headings = [_heading(panel, common) for panel in panels]
    foot = ps.measure_legend(len(providers) + 1)
    bounds = [_bounds([line for panel in row for line in panel.lines]) for row in rows]
    cut = any(
        line["ratio"]["p50"] > high
        for row, (_, high) in zip(rows, bounds, strict=True)
        for panel in row
        for line in panel.lines
    )
    pad = 0.29 if cut else 0.06
    over = 0.12 + pad + ps.LINE * max(map(len, headings))
    about = [panels[0].heading[k] for k in common if k != "work"]
    about = [*filter(None, about), "median and its 95 % interval", "lower is faster"]
    about += ["figures at the edge: beyond it"] if cut else []
    subtitle = " · ".join(about)
    heading = ps.measure_heading(subtitle)
    height = heading + len(rows) * (over + _PLOT + _UNDER) + foot
    figure = ps.make_figure(height, title, subtitle)
    above = iter(headings)
    for number, row in enumerate(rows):
        below = height - heading - (number + 1) * (over + _PLOT + _UNDER) + _UNDER
        panel_left = _LEFT
        for panel in row:
            axes = ps.add_axes(figure, panel_left, below, panel.width, _PLOT)
            _fill(axes, panel, providers, bounds[number])
            text = "\n".join(next(above))
            axes.set_title(text, size=ps.FONT - 1, loc="left", color=ps.INK, pad=72 * pad)
            if panel is row[0]:
                axes.set_ylabel("time / base", size=ps.FONT)
            else:
                axes.tick_params(axis="y", labelleft=False, length=0)
                axes.spines["left"].set_visible(False)
            axes.set_xlabel(_ALONG[panel.along], size=ps.FONT)
            panel_left += panel.width + _BETWEEN
    limit = Line2D([], [], color=ps.INK, linestyle="--", linewidth=1.4, label="limit")
    ps.add_legend(figure, [*map(ps.make_handle, providers), limit], foot)
    ps.save(figure, path)


def _heading(panel: _Panel, common: Sequence[str]) -> list[str]:
    """Wraps the heading to lines no wider than the panel."""
    texts = [text for name, text in panel.heading.items() if name not in common]
    most = int(panel.width * _CHARACTERS)
    return [line for text in texts for line in textwrap.wrap(text, most)]


def _fill(axes: Axes, panel: _Panel, providers: list[str], bounds: tuple[float, float]) -> None:
    import matplotlib.ticker as mt

    low, high = bounds
    axes.set_yscale("log")
    axes.set_ylim(bounds)
    ticks = [t for t in _TICKS if low <= t <= high]
    every = -(-len(ticks) // _TICKS_AT_MOST)
    fixed = mt.FixedLocator(ticks[ticks.index(1) % every :: every])
    fine = mt.MaxNLocator(5, steps=[1, 2, 5, 10])
    axes.yaxis.set_major_locator(fine if high / low < _FINE else fixed)
    axes.yaxis.set_major_formatter(mt.FormatStrFormatter("%g"))
    axes.yaxis.set_minor_locator(mt.NullLocator())
    axes.set_xlim(-0.5, len(panel.places) - 0.5)
    axes.set_xticks(range(len(panel.places)), [str(x) for x in panel.places])
    axes.axhline(1, color="#888888", linewidth=1.0, zorder=1)
    step = (1 - _AROUND / panel.place) / len(providers)
    for number, name in enumerate(providers):
        offset = (number - (len(providers) - 1) / 2) * step
        at = [(i, here[name]) for i, here in enumerate(panel.places.values()) if name in here]
        _points(axes, name, [i + offset for i, _ in at], [line["ratio"] for _, line in at], high)
    for i, here in enumerate(panel.places.values()):
        limit = (here.get(OURS) or next(iter(here.values()))).get("limit")
        if limit:
            axes.hlines(
                limit, i - 0.48, i + 0.48, color=ps.INK, linestyle="--", linewidth=1.4, zorder=3
            )


def _points(axes: Axes, name: str, x: list[float], ratios: list[Line], edge: float) -> None:
    style, ours = ps.choose_style(name), name == OURS
    axes.plot(
        x, [r["p50"] for r in ratios], color=style.colour, alpha=0.9 if ours else 0.3,
        linewidth=1.8 if ours else 0.9, zorder=style.above - 1,
    )  # fmt: skip
    for at, r in zip(x, ratios, strict=True):
        if r["p50"] > edge:
            axes.plot(at, edge, clip_on=False, **style.points())
            axes.annotate(
                ps.format_short(r["p50"]), (at, edge), xytext=(0, 5), textcoords="offset points",
                ha="center", va="bottom", rotation=90, size=ps.FONT - 2, color=style.colour,
            )  # fmt: skip
        else:
            spread = [[r["p50"] - r.get("low", r["p20"])], [r.get("high", r["p80"]) - r["p50"]]]
            axes.errorbar(at, r["p50"], spread, elinewidth=1.1, **style.points())


def _bounds(lines: Sequence[Line]) -> tuple[float, float]:
    """Computes a row's y-axis: the intervals and 1, with room, without values far above ours."""
    limits = [line["limit"] for line in lines if line.get("limit")]
    ours = [line["ratio"]["p50"] for line in lines if line["provider"] == OURS]
    beyond = _BEYOND * max(1.0, *ours, *limits) if ours else math.inf
    near = [line["ratio"] for line in lines if line["ratio"]["p50"] <= beyond]
    # An interval that goes on beyond it is cut.
    highs = [min(r.get("high", r["p80"]), beyond) for r in near]
    ends = 1.0, *limits, *(r.get("low", r["p20"]) for r in near), *highs
    room = max((max(ends) / min(ends)) ** 0.06, 1.01)
    return min(ends) / room, max(ends) * room
