"""Roofline: flops a second over flops a byte, under the ceilings that the same run measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.harness.case import DTYPES
from benchmarks.harness.lines import Line
from benchmarks.reports.comparison import PATHS
from benchmarks.reports.markdown import format_span
from benchmarks.reports.plots import style as ps

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Inches.
_LEFT, _BETWEEN, _RIGHT, _PLOT, _OVER, _UNDER = 0.75, 0.75, 0.2, 3.2, 0.3, 0.55


def write(folder: Path, timed: Sequence[Line], where: str) -> list[ps.Picture]:
    """Draws ``roofline.png``, a panel a dtype: all providers but our kernels' paths.

    Suite ``overhead`` is left out: the host's time says nothing of the device.
    """
    lines_of: dict[str, list[Line]] = {}
    for line in timed:
        if line["suite"] == "overhead" or line["provider"] in PATHS:
            continue
        if line.get("flops") and line.get("bytes"):
            lines_of.setdefault(line["dtype"], []).append(line)
    if not lines_of:
        return []
    providers = ps.sort_providers(line["provider"] for lines in lines_of.values() for line in lines)
    dtypes = sorted(lines_of, key=lambda dtype: (*DTYPES, dtype).index(dtype))
    foot = ps.measure_legend(len(providers))
    subtitle = (
        "a point is a provider in a case · lines: the bandwidth and the library's products that "
        "the same run measured"
    )
    height = ps.measure_heading(subtitle) + _OVER + _PLOT + _UNDER + foot
    figure = ps.make_figure(height, f"roofline, {where}", subtitle)
    width = (ps.WIDTH - _LEFT - _RIGHT - (len(dtypes) - 1) * _BETWEEN) / len(dtypes)
    for number, dtype in enumerate(dtypes):
        panel_left = _LEFT + number * (width + _BETWEEN)
        axes = ps.add_axes(figure, panel_left, foot + _UNDER, width, _PLOT)
        _panel(axes, dtype, lines_of[dtype], providers)
    ps.add_legend(figure, map(ps.make_handle, providers), foot)
    path = folder / "roofline.png"
    ps.save(figure, path)
    return [ps.Picture("", path, f"roofline, {where}")]


def _panel(axes: Axes, dtype: str, lines: Sequence[Line], providers: Sequence[str]) -> None:
    import matplotlib.ticker as mt

    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.grid(axis="both", color=ps.FAINT, linewidth=0.6)
    axes.set_xlabel("flops / byte", size=ps.FONT)
    axes.set_ylabel("TFLOP/s", size=ps.FONT)
    x = [line["flops"] / line["bytes"] for line in lines]
    ceilings = {(_bandwidth(line), _flops(line)) for line in lines} - {(0.0, 0.0)}
    tops = [flops for _, flops in ceilings if flops]
    y = [line["tflops"] for line in lines] + tops
    ridges = [flops / bandwidth for bandwidth, flops in ceilings if bandwidth and flops]
    low, high = min([*x, *ridges]) / 2, max([*x, *ridges]) * 2
    axes.set_xlim(low, high)
    axes.set_ylim(min(y) / 2, max(y) * 1.8)
    _ceilings(axes, ceilings, (low, high))
    bandwidths = [bandwidth * 1e3 for bandwidth, _ in ceilings if bandwidth]
    parts = [f"{format_span(bandwidths, 4)} GB/s"] if bandwidths else []
    parts += [f"{format_span(tops)} TFLOP/s"] if tops else []
    heading = f"{dtype}: {', '.join(parts)}" if parts else dtype
    axes.set_title(heading, size=ps.FONT, loc="left", color=ps.INK)
    for name in reversed(providers):
        mine = [line for line in lines if line["provider"] == name]
        axes.plot(
            [line["flops"] / line["bytes"] for line in mine],
            [line["tflops"] for line in mine],
            linestyle="none", alpha=0.85, **ps.choose_style(name).points(),
        )  # fmt: skip
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(mt.LogLocator(subs=(1, 2, 5), numticks=12))
        axis.set_major_formatter(mt.FormatStrFormatter("%g"))
        axis.set_minor_formatter(mt.NullFormatter())


def _bandwidth(line: Line) -> float:
    """Returns TB/s, 0 where it was not measured."""
    return (line.get("ceilings") or {}).get("bandwidth", 0.0) / 1e12


def _flops(line: Line) -> float:
    """Returns TFLOP/s of the library's product in the line's dtype."""
    return ((line.get("ceilings") or {}).get("flops") or {}).get(line["dtype"], 0.0) / 1e12


def _ceilings(axes: Axes, ceilings: set[tuple[float, float]], ends: tuple[float, float]) -> None:
    """Draws a line for each run."""
    for bandwidth, flops in ceilings:
        ridge = flops / bandwidth if bandwidth and flops else ends[1]
        x = [ends[0], min(max(ridge, ends[0]), ends[1]), ends[1]]
        y = [min(bandwidth * at, flops or float("inf")) for at in x]
        axes.plot(x, y, color=ps.INK, linewidth=1.3, zorder=2)
