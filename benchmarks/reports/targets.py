"""``python -m benchmarks.reports.targets [DIR]``: each target and what was measured, met or missed.

DIR: of results, by default this device's. Exit code 0 whatever was met, 2 where DIR cannot be read.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from benchmarks import RESULTS
from benchmarks.harness import lines
from benchmarks.harness.lines import Line
from benchmarks.reports.target_list import TARGETS, Target

MET, NOISE, MISSED, UNKNOWN = "met", "within noise", "missed", "not measured"


@dataclass(frozen=True)
class Measured:
    """One case's value, its interval and the provider it is of."""

    case: str
    provider: str
    value: float
    low: float
    high: float


def find_values(target: Target, lines: Sequence[Line]) -> tuple[list[Measured], list[str]]:
    """Finds the value of each case that matches, and why others have none."""
    by_case: dict[str, dict[str, Line]] = {}
    for line in lines:
        if line["device"] == target.device and _matches(line["case"], target.cases):
            by_case.setdefault(line["case"], {})[line["provider"] or ""] = line
    values, reasons = [], []
    for case, line_of in by_case.items():
        timed = [line_of[name] for name in target.ours if "ratio" in line_of.get(name, {})]
        over = line_of.get(target.over, {})
        if not timed or "ratio" not in over:
            dead = [line_of[name] for name in ("", *target.ours, target.over) if name in line_of]
            reason = next(
                (f"{d['status']}: {d.get('reason')}" for d in dead if "ratio" not in d), ""
            )
            reasons.append(f"{case}: {reason or 'no such provider'}")
            continue
        each = [_compute_value(target, case, line, over) for line in timed]
        pick = max if target.at_least else min
        values.append(pick(each, key=lambda m: m.value))
    return values, reasons


def _matches(case: str, globs: Sequence[str]) -> bool:
    return any(fnmatchcase(case, glob) for glob in globs)


def _compute_value(target: Target, case: str, line: Line, over: Line) -> Measured:
    ratio, other = _read_interval(line), _read_interval(over)
    # Both are ratios to the base: that of the two is as wide as both of them.
    middle, low, high = ratio[0] / other[0], ratio[1] / other[2], ratio[2] / other[1]
    if target.measure == "limit":
        middle, low, high = (v / line["limit"] for v in (middle, low, high))
    elif target.measure == "times":
        middle, low, high = 1 / middle, 1 / high, 1 / low
    elif target.measure == "bandwidth":
        share = line["gbps"] * 1e9 / line["ceilings"]["bandwidth"]
        middle, low, high = share, share * ratio[0] / ratio[2], share * ratio[0] / ratio[1]
    return Measured(case, line["provider"], middle, low, high)


def _read_interval(line: Line) -> tuple[float, float, float]:
    ratio: Mapping[str, float] = line["ratio"]
    # Older lines have no interval, only how the rounds were spread.
    return ratio["p50"], ratio.get("low", ratio["p20"]), ratio.get("high", ratio["p80"])


def judge(target: Target, m: Measured) -> str:
    """Judges: met or missed when the whole interval is, else noise."""
    if target.at_least:
        return MET if m.low >= target.bound else MISSED if m.high < target.bound else NOISE
    return MET if m.high <= target.bound else MISSED if m.low > target.bound else NOISE


def make_row(target: Target, lines: Sequence[Line]) -> tuple[str, str, str, str]:
    """Makes a row: work, target, value (the worst of several cases), result."""
    bound = f"{'>=' if target.at_least else '<='} {_format_number(target, target.bound)}"
    values, reasons = find_values(target, lines)
    if not values:
        return target.work, bound, "", f"{UNKNOWN}: {reasons[0]}" if reasons else UNKNOWN
    pick = min if target.at_least else max
    worst = pick(values, key=lambda m: m.low if target.at_least else m.high)
    verdicts = [judge(target, m) for m in values]
    missed = verdicts.count(MISSED)
    result = MISSED if missed else NOISE if NOISE in verdicts else MET
    if missed:
        worst = pick(
            (m for m, v in zip(values, verdicts, strict=True) if v == MISSED),
            key=lambda m: m.value,
        )
        result += f" by {_format_number(target, abs(worst.value - target.bound))}"
    text = f"{_format_number(target, worst.value)} ({_format_number(target, worst.low)} to "
    text += f"{_format_number(target, worst.high)})"
    if len(target.ours) > 1:
        text += f" by {worst.provider}"
    if len(values) > 1:
        text += f", worst of {len(values)}: {worst.case}"
        result += f", {missed} of {len(values)}" if missed else ""
    return target.work, bound, text, result + (f", {len(reasons)} without" if reasons else "")


def _format_number(target: Target, value: float) -> str:
    return f"{value:.1f}x" if target.measure == "times" else f"{value:.3f}"


def make_table(lines: Sequence[Line], *, markdown: bool) -> str:
    """Makes a table of the targets of the devices that the lines are of."""
    devices = {line["device"] for line in lines}
    chosen = [target for target in TARGETS if target.device in devices]
    rows = [
        ("work", "target", "measured", "result"),
        *(make_row(target, lines) for target in chosen),
    ]
    if markdown:
        because = ["because", *(target.because for target in chosen)]
        wide = [f"| {' | '.join((*r, why))} |" for r, why in zip(rows, because, strict=True)]
        return "\n".join([wide[0], "|---" * 5 + "|", *wide[1:]])
    widths = [max(len(r[i]) for r in rows) for i in range(4)]
    cells = ([f"{cell:<{w}}" for cell, w in zip(r, widths, strict=True)] for r in rows)
    return "\n".join("  ".join(each).rstrip() for each in cells)


def main(
    argv: Sequence[str] | None = None, prog: str = "python -m benchmarks.reports.targets"
) -> int:
    parser = argparse.ArgumentParser(prog=prog, description=__doc__)
    parser.add_argument("folder", metavar="DIR", nargs="?", type=Path)
    parser.add_argument("--markdown", action="store_true", help="with the reasons of the targets")
    options = parser.parse_args(argv)
    folder = options.folder or _find_folder()
    try:
        results = lines.read_all(folder)
    except (OSError, ValueError) as error:
        print(f"benchmarks: targets: {error}", file=sys.stderr)
        return 2
    print(make_table(results, markdown=options.markdown))
    return 0


def _find_folder() -> Path:
    import torch

    from benchmarks.harness import machine

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return RESULTS / machine.name_folder(device)


if __name__ == "__main__":
    sys.exit(main())
