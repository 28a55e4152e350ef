"""Who is faster than whom in a case, as far as the intervals of both ratios tell.

Two providers are told apart where the 95 % intervals of their ratios to the base do not touch. A
ratio is formed within a round of one run, so lines of different runs are not compared.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from benchmarks.harness.lines import Line
from benchmarks.harness.work import BASE
from benchmarks.suites import linear, multi

OURS = "fastlora"
# fastlora along one path each: of the Triton kernels, on one backend alone, and on a CPU with the
# base's product in its own kernel or by torch.
PATHS = (*dict.fromkeys((*linear.PATHS, *multi.PATHS)), "triton", "cuda", "native", "torch-product")
# One adapter's weights, merged before the clock starts: nothing is left to do but the base's work.
MERGED = ("merged", "peft-merged")
# They compute something else than LoRA.
_OTHER_FUNCTIONS = ("peft-prefix", "peft-prompt")
_COMPILED = "-compiled"

# Sizes that were chosen to see where one of our paths is better than another.
_OWN_SIZES = "linear-native"

LOSES, WINS, EVEN, UNKNOWN = "loses", "wins", "even", "not compared"


def is_ours(provider: str) -> bool:
    """peft-patched: PEFT's model on fastlora's kernels."""
    return provider.startswith(OURS) or provider == "peft-patched" or provider in PATHS


def is_rival(provider: str) -> bool:
    """Whoever does the same work in a call and is not ours."""
    idle = provider.startswith(BASE) or provider in MERGED or provider in _OTHER_FUNCTIONS
    return not idle and not is_ours(provider)


@dataclass(frozen=True)
class Pair:
    """fastlora beside another provider of a case, in one run; compiled beside compiled."""

    ours: Line
    other: Line

    @property
    def factor(self) -> float:
        """fastlora's median ratio over the other's: above 1 it is slower."""
        return self.ours["ratio"]["p50"] / self.other["ratio"]["p50"]

    @property
    def outcome(self) -> str:
        ours, other = self.ours["ratio"], self.other["ratio"]
        if other["high"] < ours["low"]:
            return LOSES
        return WINS if ours["high"] < other["low"] else EVEN

    @property
    def by(self) -> float:
        """How many times faster the faster one is, by the medians."""
        return max(self.factor, 1 / self.factor)

    @property
    def at_least(self) -> float:
        """The same by the intervals' near ends; below 1 where they overlap."""
        ours, other = self.ours["ratio"], self.other["ratio"]
        return max(ours["low"] / other["high"], other["low"] / ours["high"])


@dataclass(frozen=True)
class Standing:
    """Of fastlora in one case. pairs: with everyone else; merged: with weights merged beforehand;
    paths: with its own paths. Faster ones come first. reason: why there are no pairs.
    """

    case: str
    pairs: list[Pair] = field(default_factory=list)
    merged: list[Pair] = field(default_factory=list)
    paths: list[Pair] = field(default_factory=list)
    reason: str = ""

    @property
    def outcome(self) -> str:
        """It loses where anyone is ahead, and wins where it is ahead of all."""
        found = {pair.outcome for pair in self.pairs}
        if LOSES in found:
            return LOSES
        return UNKNOWN if not found else WINS if found == {WINS} else EVEN


def by_case(lines: Iterable[Line]) -> dict[str, dict[str | None, Line]]:
    """The last line of each provider; under None what became of a case's process."""
    found: dict[str, dict[str | None, Line]] = {}
    for line in lines:
        found.setdefault(line["case"], {})[line.get("provider")] = line
    return found


def work_of(line: Line) -> str:
    """``linear-train``, ``multi-decode``: a case's name up to its dtype."""
    return line["case"].split(f"-{line['dtype']}-")[0]


def run_of(line: Line) -> tuple[Any, ...]:
    """Equal for lines of one run: ceilings are measured once a run, and never come out the same."""
    ceilings = line.get("ceilings") or {}
    flops = tuple(sorted((ceilings.get("flops") or {}).items()))
    where = (line.get("device_name"), line.get("threads"), line.get("commit"), line.get("seed"))
    return (*where, ceilings.get("bandwidth"), flops)


def standings(lines: Iterable[Line]) -> list[Standing]:
    """One for each case, in the order of the lines."""
    counted = (line for line in lines if not line["case"].startswith(_OWN_SIZES))
    return [_standing(case, providers) for case, providers in by_case(counted).items()]


def _standing(case: str, providers: dict[str | None, Line]) -> Standing:
    ours = providers.get(OURS)
    why = _incomparable(ours, providers.get(None))
    if ours is None or why:
        return Standing(case, reason=why)
    timed = {
        name: line
        for name, line in providers.items()
        if name is not None and _has_interval(line) and run_of(line) == run_of(ours)
    }
    compiled = timed.get(OURS + _COMPILED, ours)
    pairs = [
        Pair(compiled if name.endswith(_COMPILED) else ours, line) for name, line in timed.items()
    ]
    pairs.sort(key=lambda pair: -pair.factor)
    rivals = [pair for pair in pairs if is_rival(pair.other["provider"])]
    merged, paths = (
        [pair for pair in pairs if pair.other["provider"] in names] for names in (MERGED, PATHS)
    )
    why = "" if rivals else "nobody else was timed in the same run"
    return Standing(case, rivals, merged, paths, why)


def _incomparable(ours: Line | None, process: Line | None) -> str:
    """Why fastlora has no place in a case, or "" where it has."""
    if ours is None:
        if process is None:
            return f"no line of {OURS}"
        return f"{process['status']}: {process.get('reason')}"
    if ours["status"] != "ok":
        return f"{OURS} {ours['status']}: {ours.get('reason')}"
    if not ours.get("ratio"):
        return "the base was not timed"
    return "" if _has_interval(ours) else "its ratio has no interval"


def _has_interval(line: Line) -> bool:
    return {"low", "high"} <= (line.get("ratio") or {}).keys()
