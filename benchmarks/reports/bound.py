"""Ours beside the fastest peer of the same run: how many times longer it may take.

With one CPU thread both clocks must say so, the wall's and that of CPU time: on a machine that
others use the wall's alone said 3.3 of a merge that takes 1.6. With several threads CPU time would
not see that they wait for each other, and the wall's clock decides.

A loss that is no defect, because the peer does less, stands in ``KNOWN`` with its reason and what
was measured. Such a pair is shown and not judged; the case's other peers are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from benchmarks.harness.lines import Line
from benchmarks.reports.standing import OURS, Pair, by_case, is_rival

_COMPILED = "-compiled"


@dataclass(frozen=True)
class Known:
    """A provider of ours beside a peer in some cases, on some CPUs: patterns of names."""

    case: str
    ours: str
    peer: str
    why: str
    measured: str
    instructions: str = "*"

    def covers(self, ours: Line, peer: Line) -> bool:
        pairs = (
            (ours["case"], self.case),
            (ours["provider"], self.ours),
            (peer["provider"].removesuffix(_COMPILED), self.peer),
            (ours.get("instruction_set", ""), self.instructions),
        )
        return all(fnmatchcase(name, pattern) for name, pattern in pairs)


KNOWN = (
    Known(
        "merge-unmerge-*",
        "*",
        "torch",
        "addmm_ there and back leaves rounding in the weight; ours gives back every bit",
        "4.5 to 4.8 on AMD EPYC avx512_bf16, 2.5 on Intel Xeon avx512_bf16+amx",
    ),
    Known(
        "swap-*",
        "*",
        "torch",
        "addmm_ leaves the old adapter's rounding in the weight; ours has the bits of a new merge",
        "4.2 to 4.4 on AMD EPYC avx512_bf16, 2.7 on Intel Xeon avx512_bf16+amx",
    ),
    Known(
        "overhead-forward-*",
        "*",
        "torch",
        "three bare products of 64 x 64 beside a module's call: fixed microseconds, no larger "
        "layer notices",
        "2.8 to 3.0 on AMD EPYC avx512_bf16, 4.5 on Intel Xeon avx512_bf16+amx",
    ),
    Known(
        "linear-invariant-bf16-*",
        "fastlora-invariant",
        "*",
        "a row's bits do not depend on its batch, which no peer promises; ours has no AMX kernel",
        "6.8 on Intel Xeon avx512_bf16+amx, 512 rows",
        instructions="*+amx",
    ),
)


def times(pair: Pair) -> float:
    """How many times as long ours takes, as far as it is ours."""
    if (pair.ours["device"], pair.ours["threads"]) != ("cpu", 1):
        return pair.factor
    ours, other = (line["cpu_ratio"]["p50"] for line in (pair.ours, pair.other))
    return min(pair.factor, ours / other)


def pairs(found: Iterable[Line]) -> list[Pair]:
    """Each provider of ours and the fastest peer that does the same work, the worst first.

    found: of one run. Compiled ones are set beside compiled ones.
    """
    fastest = []
    for ours, peers in _beside(found):
        judged = [Pair(ours, line) for line in peers if _known(ours, line) is None]
        if judged:
            fastest.append(max(judged, key=times))
    return sorted(fastest, key=times, reverse=True)


def excused(found: Iterable[Line]) -> list[tuple[Pair, Known]]:
    """The pairs that ``KNOWN`` leaves out, and why."""
    every = [(Pair(ours, line), _known(ours, line)) for ours, of in _beside(found) for line in of]
    return [(pair, known) for pair, known in every if known is not None]


def missing(wanted: Mapping[str, Iterable[str]], found: Iterable[Line]) -> list[str]:
    """Providers of ours that were not timed, and why. wanted: all of a case's, by its name."""
    said = []
    for case, of in by_case(found).items():
        for name in filter(_is_judged, wanted.get(case, ())):
            line = of.get(name) or of.get(None) or {"status": "left out", "reason": None}
            if "ratio" not in line:
                said.append(f"{case}: {name} {line['status']}: {line.get('reason')}")
    return said


def table(found: Sequence[Pair], bound: float) -> tuple[list[str], list[list[str]]]:
    """Heading and rows."""
    rows = [
        [
            pair.ours["case"],
            pair.ours["provider"],
            pair.other["provider"],
            f"{pair.factor:.2f}",
            f"{times(pair):.2f}",
            f"over {bound:g}" if times(pair) > bound else "",
        ]
        for pair in found
    ]
    return ["case", "ours", "fastest peer", "times its time", "judged by", ""], rows


def _beside(found: Iterable[Line]) -> Iterator[tuple[Line, list[Line]]]:
    """Every provider of ours that was timed, and its peers."""
    for of in by_case(found).values():
        timed = {name: line for name, line in of.items() if name and "ratio" in line}
        ours = {name: _compiles(name) for name in timed if _is_judged(name)}
        for name, kind in ours.items():
            # Where nothing of ours is compiled, compiled peers are peers as well.
            kinds = {kind} if any(ours.values()) else {False, True}
            peers = (other for other in timed if is_rival(other) and _compiles(other) in kinds)
            yield timed[name], [timed[other] for other in peers]


def _compiles(provider: str) -> bool:
    return provider.endswith(_COMPILED)


def _is_judged(provider: str) -> bool:
    """fastlora as users call it, not one path that is forced."""
    return provider.startswith(OURS)


def _known(ours: Line, peer: Line) -> Known | None:
    return next((known for known in KNOWN if known.covers(ours, peer)), None)
