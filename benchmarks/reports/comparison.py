"""Comparison of a case's providers, as far as the intervals of their ratios tell.

One provider is faster than another where the 95 % intervals of their ratios to the base do not
touch. A ratio is formed within a round of one run, so lines of different runs are not compared.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from benchmarks.harness.case import BASE
from benchmarks.harness.lines import Line
from benchmarks.suites import linear, multi

OURS = "fastlora"
# fastlora along one path each: of the Triton kernels, on one backend alone, and on a CPU with the
# base's product in its own kernel or by torch.
PATHS = (*dict.fromkeys((*linear.PATHS, *multi.PATHS)), "triton", "cuda", "native", "torch-product")
# One adapter's weights, merged before the clock starts: nothing is left to do but the base's work.
MERGED = ("merged", "peft-merged")
# Providers that compute something else than LoRA.
_OTHER_FUNCTIONS = ("peft-prefix", "peft-prompt")
_COMPILED = "-compiled"

# Sizes that were chosen to see where one of our paths is better than another.
_OWN_SIZES = "linear-native"

LOSES, WINS, EVEN, UNKNOWN = "loses", "wins", "even", "not compared"


def is_ours(provider: str) -> bool:
    """Whether a provider is fastlora's; peft-patched is PEFT's model on fastlora's kernels."""
    return provider.startswith(OURS) or provider == "peft-patched" or provider in PATHS


def is_rival(provider: str) -> bool:
    """Whether a provider does the same work in a call and is not ours."""
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
    """Standing of fastlora in one case. pairs: with all others; merged: with weights merged before;
    paths: with its own paths. Faster ones come first. reason: why there are no pairs.
    """

    case: str
    pairs: list[Pair] = field(default_factory=list)
    merged: list[Pair] = field(default_factory=list)
    paths: list[Pair] = field(default_factory=list)
    reason: str = ""

    @property
    def outcome(self) -> str:
        """A loss where any other is ahead, a win where fastlora is ahead of all."""
        outcomes = {pair.outcome for pair in self.pairs}
        if LOSES in outcomes:
            return LOSES
        return UNKNOWN if not outcomes else WINS if outcomes == {WINS} else EVEN


def group_by_case(lines: Iterable[Line]) -> dict[str, dict[str | None, Line]]:
    """Groups lines: the last of each provider by case; under None that of a case's process."""
    groups: dict[str, dict[str | None, Line]] = {}
    for line in lines:
        groups.setdefault(line["case"], {})[line.get("provider")] = line
    return groups


def name_work(line: Line) -> str:
    """Returns a case's name up to its dtype: ``linear-train``, ``multi-decode``."""
    return line["case"].split(f"-{line['dtype']}-")[0]


def identify_run(line: Line) -> tuple[Any, ...]:
    """Returns a key that lines of one run share: ceilings differ from run to run."""
    ceilings = line.get("ceilings") or {}
    flops = tuple(sorted((ceilings.get("flops") or {}).items()))
    where = (line.get("device_name"), line.get("threads"), line.get("commit"), line.get("seed"))
    return (*where, ceilings.get("bandwidth"), flops)


def compare_all(lines: Iterable[Line]) -> list[Standing]:
    """Compares each case, in the order of the lines."""
    counted = (line for line in lines if not line["case"].startswith(_OWN_SIZES))
    return [_compare(case, providers) for case, providers in group_by_case(counted).items()]


def _compare(case: str, providers: dict[str | None, Line]) -> Standing:
    ours = providers.get(OURS)
    reason = _explain_incomparable(ours, providers.get(None))
    if ours is None or reason:
        return Standing(case, reason=reason)
    timed = {
        name: line
        for name, line in providers.items()
        if name is not None and _has_interval(line) and identify_run(line) == identify_run(ours)
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
    reason = "" if rivals else "nobody else was timed in the same run"
    return Standing(case, rivals, merged, paths, reason)


def _explain_incomparable(ours: Line | None, process: Line | None) -> str:
    """Says why fastlora cannot be compared in a case, or "" where it can."""
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
