"""Ratio to the base over rows (linear) and over adapters (multi): a panel for what else differs.

Panels are as wide as they have places on their x-axis and fill rows, which share a y-axis: three
measured shapes make three narrow panels, thirty some wide ones. Providers stand side by side at a
place, so that no interval hides another's.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import plot_style as ps
from benchmarks.lines import Line
from benchmarks.standing import OURS
from benchmarks.work import BASE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# The dimension along x, by suite, and its name on the axis.
_ALONG = {"linear": ("M", "rows M"), "multi": ("S", "adapters S")}

# Inches.
_LEFT, _RIGHT, _BETWEEN, _PLOT = 0.62, 0.1, 0.16, 1.75
_UNDER = 0.55
_SLOT, _AROUND, _NARROWEST = 0.085, 0.16, 1.05
_ROWS = 5  # in one picture; what does not fit goes to the next
_TICKS = (0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100, 200, 500)


@dataclass
class _Panel:
    heading: tuple[str, ...]
    places: dict[int, dict[str, Line]]  # by x: providers' lines
    place: float  # inches

    @property
    def width(self) -> float:
        return max(_NARROWEST, len(self.places) * self.place)


def write(folder: Path, timed: Sequence[Line], where: str) -> list[ps.Picture]:
    """A picture for each suite that has ratios, or for each of its works where they are many.

    timed: lines with times.
    """
    written = []
    for suite in _ALONG:
        found = [line for line in timed if line["suite"] == suite and line.get("ratio")]
        works: dict[str, list[Line]] = {suite: found}
        if len(_layout(suite, found)) > _ROWS:
            works = {}
            for line in found:
                works.setdefault(_work(line), []).append(line)
        for work, its_lines in works.items():
            rows = _layout(suite, its_lines)
            pages = [rows[first : first + _ROWS] for first in range(0, len(rows), _ROWS)]
            for number, page in enumerate(pages, 1):
                name = work if len(pages) == 1 else f"{work}-{number}"
                path = folder / f"{name}.png"
                _draw(path, page, f"{work}: time over the base layer's", where, suite)
                caption = f"{name}: ratio to the base over {_ALONG[suite][1]}, {where}"
                written.append(ps.Picture(suite, path, caption))
    return written


def _work(line: Line) -> str:
    """``linear-train``, ``multi-decode``: a case's name up to its dtype."""
    return line["case"].split(f"-{line['dtype']}-")[0]


def _layout(suite: str, found: Iterable[Line]) -> list[list[_Panel]]:
    """Rows of panels, in an order in which neighbours differ little."""
    along, panels = _ALONG[suite][0], {}
    found = [line for line in found if line["provider"] != BASE and along in line["shape"]]
    place = len({line["provider"] for line in found}) * _SLOT + _AROUND
    works = list(dict.fromkeys(map(_work, found)))
    for line in found:
        key, heading = _key(line, along)
        panel = panels.setdefault((works.index(_work(line)), key), _Panel(heading, {}, place))
        panel.places.setdefault(line["shape"][along], {})[line["provider"]] = line
    for panel in panels.values():
        panel.places = dict(sorted(panel.places.items()))
    return _rows(panels[key] for key in sorted(panels))


def _key(line: Line, along: str) -> tuple[tuple, tuple[str, ...]]:
    """What separates and orders the panels of a work, and what stands above one, a part a line."""
    shape, mixed = line["shape"], "ranks_mixed" in line["case"]
    K, N, R = (shape.get(k, 0) for k in "KNR")
    dtype, lora_dtype = line["dtype"], line["lora_dtype"]
    rest = {k: v for k, v in shape.items() if k not in (along, *"KNR")}
    workload, dropout = line.get("workload") or "", line.get("dropout") or 0.0
    key = (dtype, lora_dtype != dtype, N, K, R, mixed, dropout, tuple(rest.values()), workload)
    heading = (
        _work(line).removeprefix(line["suite"] + "-"),
        " ".join(filter(None, (*(f"{k} {v}" for k, v in rest.items()), workload))),
        f"{K} × {N}",
        f"r 8 to {R}" if mixed else f"r {R}",
        f"dropout {dropout:g}" if dropout else "",
        dtype if lora_dtype == dtype else f"{dtype}, A B {lora_dtype}",
    )
    return key, heading


def _rows(panels: Iterable[_Panel]) -> list[list[_Panel]]:
    """Panels in their order, as many in a row as there is room for."""
    rows: list[list[_Panel]] = []
    room = 0.0
    for panel in panels:
        if not rows or panel.width > room:
            rows.append([])
            room = ps.WIDTH - _LEFT - _RIGHT
        rows[-1].append(panel)
        room -= panel.width + _BETWEEN
    return rows


def _draw(path: Path, rows: list[list[_Panel]], title: str, where: str, suite: str) -> None:
    from matplotlib.lines import Line2D

    panels = [panel for row in rows for panel in row]
    providers = ps.ordered(n for p in panels for here in p.places.values() for n in here)
    # What all panels have in common is said once.
    parts = list(zip(*(panel.heading for panel in panels), strict=True))
    common = [values[0] for values in parts if len(set(values)) == 1 and values[0]]
    headings = [
        [part for part, values in zip(panel.heading, parts, strict=True) if len(set(values)) > 1]
        for panel in panels
    ]
    headings = [[part for part in heading if part] for heading in headings]
    foot = ps.legend_height(len(providers) + 1)
    over = 0.15 + ps.LINE * max(map(len, headings))
    height = ps.HEADING + len(rows) * (over + _PLOT + _UNDER) + foot
    about = [where, *common, "median and its 95 % interval", "lower is faster, 1 is the base"]
    made = ps.figure(height, title, " · ".join(about))
    above = iter(headings)
    for number, row in enumerate(rows):
        below = height - ps.HEADING - (number + 1) * (over + _PLOT + _UNDER) + _UNDER
        bounds, left = _bounds(row), _LEFT
        for panel in row:
            axes = ps.axes(made, left, below, panel.width, _PLOT)
            _fill(axes, panel, providers, bounds)
            axes.set_title("\n".join(next(above)), size=ps.FONT - 1, loc="left", color=ps.INK)
            if panel is row[0]:
                axes.set_ylabel("time / base", size=ps.FONT)
            else:
                axes.tick_params(axis="y", labelleft=False, length=0)
                axes.spines["left"].set_visible(False)
            axes.set_xlabel(_ALONG[suite][1], size=ps.FONT)
            left += panel.width + _BETWEEN
    limit = Line2D([], [], color=ps.INK, linestyle="--", linewidth=1.4, label="limit")
    ps.legend(made, [*map(ps.handle, providers), limit], foot)
    ps.save(made, path)


def _fill(axes: Axes, panel: _Panel, providers: list[str], bounds: tuple[float, float]) -> None:
    import matplotlib.ticker as mt

    axes.set_yscale("log")
    axes.set_ylim(bounds)
    low, high = bounds
    if high / low < 2.5:
        axes.yaxis.set_major_locator(mt.MaxNLocator(5))
    else:
        ticks = [t for t in _TICKS if low <= t <= high]
        every = -(-len(ticks) // 7)
        axes.yaxis.set_major_locator(mt.FixedLocator(ticks[ticks.index(1) % every :: every]))
    axes.yaxis.set_major_formatter(mt.FormatStrFormatter("%g"))
    axes.yaxis.set_minor_locator(mt.NullLocator())
    axes.set_xlim(-0.5, len(panel.places) - 0.5)
    axes.set_xticks(range(len(panel.places)), [str(x) for x in panel.places])
    axes.axhline(1, color="#888888", linewidth=1.0, zorder=1)
    step = (1 - _AROUND / panel.place) / max(1, len(providers))
    for number, name in enumerate(providers):
        offset = (number - (len(providers) - 1) / 2) * step
        at = [(i, here[name]) for i, here in enumerate(panel.places.values()) if name in here]
        if at:
            _points(axes, name, [i + offset for i, _ in at], [line["ratio"] for _, line in at])
    for i, here in enumerate(panel.places.values()):
        limit = (here.get(OURS) or next(iter(here.values()))).get("limit")
        if limit:
            axes.hlines(
                limit, i - 0.48, i + 0.48, color=ps.INK, linestyle="--", linewidth=1.4, zorder=3
            )


def _points(axes: Axes, name: str, x: list[float], ratios: list[Line]) -> None:
    style, y = ps.style(name), [r["p50"] for r in ratios]
    spread = [
        [r["p50"] - r.get("low", r["p20"]) for r in ratios],
        [r.get("high", r["p80"]) - r["p50"] for r in ratios],
    ]
    emphasis = name == OURS
    axes.plot(
        x, y, color=style.colour, alpha=0.9 if emphasis else 0.3,
        linewidth=1.8 if emphasis else 0.9, zorder=style.above - 1,
    )  # fmt: skip
    axes.errorbar(x, y, yerr=spread, linestyle="none", elinewidth=1.1, **style.points())


def _bounds(row: Iterable[_Panel]) -> tuple[float, float]:
    """Of a row's y-axis: everything in it and 1, with some room."""
    ends = [1.0]
    for panel in row:
        for here in panel.places.values():
            for line in here.values():
                ratio = line["ratio"]
                ends += [ratio.get("low", ratio["p20"]), ratio.get("high", ratio["p80"])]
                ends += [line["limit"]] if line.get("limit") else []
    room = max((max(ends) / min(ends)) ** 0.06, 1.01)
    return min(ends) / room, max(ends) * room
