"""Pictures of results, where matplotlib is installed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness.lines import Line
from benchmarks.reports import provenance
from benchmarks.reports.plots.style import Picture


class NoMatplotlib(ImportError):
    """Nothing can be drawn; the message says what to install."""


def write(folder: Path, lines: Sequence[Line]) -> list[Picture]:
    """Draws what the lines have figures for, as PNGs into ``folder``.

    Raises NoMatplotlib where it cannot be imported.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise NoMatplotlib(
            f"matplotlib cannot be imported ({error}); pip install '.[bench]' brings it"
        ) from error
    from benchmarks.reports.plots import merge as plot_merge
    from benchmarks.reports.plots import ratio as plot_ratio
    from benchmarks.reports.plots import roofline as plot_roofline

    where, timed = provenance.name_devices(lines), [line for line in lines if "ms" in line]
    return [
        *plot_ratio.write(folder, timed, where),
        *plot_merge.write(folder, timed, where),
        *plot_roofline.write(folder, timed, where),
    ]
