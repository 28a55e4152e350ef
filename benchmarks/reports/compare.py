"""This run beside an earlier one: what became slower, by ratios that a run forms within itself.

A ratio's other side may change too, in noise or with a newer torch. So a provider of ours counts as
slower when its ratio to the base and its ratio to the leanest torch both say so. Ratios of another
device, instruction set or number of threads are shown and not judged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.harness.lines import Line
from benchmarks.harness.work import BASE, YARDSTICK
from benchmarks.reports.standing import OURS

# The least slow-down that counts. One by half is above it with room for noise: six quick runs of an
# unchanged tree, on two cores that four other processes wanted, were off by 1.01 to 1.29 at worst,
# once by 1.78.
MARGIN = 1.35

NOTHING = "nothing was judged: no provider of ours was measured on this device both times"


@dataclass(frozen=True)
class Change:
    """Of one provider: its ratio to the base then and now, how much slower it is at least."""

    case: str
    provider: str
    then: float
    now: float
    slowdown: float
    judged: bool

    @property
    def slower(self) -> bool:
        return self.judged and self.slowdown > MARGIN


def changes(now: Sequence[Line], then: Sequence[Line]) -> list[Change]:
    """Every provider of ours that was timed both times, the one that lost most first."""
    ratios, before = _ratios(now), _ratios(then)
    where, earlier = _timed(now), _timed(then)
    found = []
    for key in ratios.keys() & before.keys():
        case, provider = key
        if not provider.startswith(OURS):
            continue
        growth = [ratios[key] / before[key]]
        yardstick = (case, YARDSTICK)
        if yardstick in ratios and yardstick in before:
            growth.append(growth[0] * before[yardstick] / ratios[yardstick])
        here = _same_device(where[case], earlier[case])
        found.append(Change(*key, before[key], ratios[key], min(growth), here))
    return sorted(found, key=lambda change: -change.slowdown)


def table(found: Sequence[Change]) -> tuple[list[str], list[list[str]]]:
    """Heading and rows."""
    rows = [
        [
            change.case,
            change.provider,
            f"{change.then:.2f}",
            f"{change.now:.2f}",
            f"{change.slowdown:.2f}",
            "slower" if change.slower else "" if change.judged else "another device",
        ]
        for change in found
    ]
    return ["case", "provider", f"/ {BASE}, then", "now", "slower by", ""], rows


def _ratios(lines: Sequence[Line]) -> dict[tuple[str, str], float]:
    return {(ln["case"], ln["provider"]): ln["ratio"]["p50"] for ln in lines if "ratio" in ln}


def _timed(lines: Sequence[Line]) -> dict[str, Line]:
    return {line["case"]: line for line in lines if "ratio" in line}


def _same_device(a: Line, b: Line) -> bool:
    names = ["device_name", "threads"]
    if "instruction_set" in a and "instruction_set" in b:  # older lines do not say
        names.append("instruction_set")
    return all(a[name] == b[name] for name in names)
