"""Comparison with an earlier run: what became slower, by ratios formed within each run.

A ratio's other side may change too, in noise or with a newer torch. So a provider of ours counts as
slower when its ratio to the base and its ratio to the leanest torch both say so. Ratios of another
device, instruction set or number of threads are shown and not judged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.harness.case import BASE, YARDSTICK
from benchmarks.harness.lines import Line
from benchmarks.reports.comparison import OURS

# The least slow-down that counts. One by half is above it with room for noise: six quick runs of an
# unchanged tree, on two cores that four other processes wanted, were off by 1.01 to 1.29 at worst,
# once by 1.78.
MARGIN = 1.35

NOTHING = "nothing was judged: no provider of ours was measured on this device both times"


@dataclass(frozen=True)
class Change:
    """One provider's ratio to the base then and now, and how much slower it is at least."""

    case: str
    provider: str
    then: float
    now: float
    slowdown: float
    judged: bool

    @property
    def slower(self) -> bool:
        return self.judged and self.slowdown > MARGIN


def list_changes(now: Sequence[Line], then: Sequence[Line]) -> list[Change]:
    """Lists every provider of ours that was timed both times, the one that lost most first."""
    ratios, before = _read_ratios(now), _read_ratios(then)
    where, earlier = _select_timed(now), _select_timed(then)
    changes = []
    for key in ratios.keys() & before.keys():
        case, provider = key
        if not provider.startswith(OURS):
            continue
        growth = [ratios[key] / before[key]]
        yardstick = (case, YARDSTICK)
        if yardstick in ratios and yardstick in before:
            growth.append(growth[0] * before[yardstick] / ratios[yardstick])
        here = _is_same_device(where[case], earlier[case])
        changes.append(Change(*key, before[key], ratios[key], min(growth), here))
    return sorted(changes, key=lambda change: -change.slowdown)


def make_table(changes: Sequence[Change]) -> tuple[list[str], list[list[str]]]:
    """Returns heading and rows."""
    rows = [
        [
            change.case,
            change.provider,
            f"{change.then:.2f}",
            f"{change.now:.2f}",
            f"{change.slowdown:.2f}",
            "slower" if change.slower else "" if change.judged else "another device",
        ]
        for change in changes
    ]
    return ["case", "provider", f"/ {BASE}, then", "now", "slower by", ""], rows


def _read_ratios(lines: Sequence[Line]) -> dict[tuple[str, str], float]:
    return {(ln["case"], ln["provider"]): ln["ratio"]["p50"] for ln in lines if "ratio" in ln}


def _select_timed(lines: Sequence[Line]) -> dict[str, Line]:
    return {line["case"]: line for line in lines if "ratio" in line}


def _is_same_device(a: Line, b: Line) -> bool:
    names = ["device_name", "threads"]
    if "instruction_set" in a and "instruction_set" in b:  # older lines do not say
        names.append("instruction_set")
    return all(a[name] == b[name] for name in names)
