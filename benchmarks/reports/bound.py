"""Ours beside the fastest peer of the same run: how many times longer it may take.

A loss that is no defect, because the peer does less, stands in ``KNOWN`` with its reason and what
was measured. Such a pair is shown and not judged; the case's other peers are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.harness.lines import Line
from benchmarks.reports.standing import OURS, Pair, by_case, is_rival, work_of

_COMPILED = "-compiled"


@dataclass(frozen=True)
class Known:
    """Of every provider of ours beside one peer, in all cases of a work."""

    work: str
    peer: str
    why: str
    measured: str


KNOWN = (
    Known(
        "merge-unmerge",
        "torch",
        "addmm_ there and back leaves rounding in the weight; ours gives back every bit",
        "4.8 on AMD EPYC avx512_bf16, 2.7 on Intel Xeon avx512_bf16+amx",
    ),
    Known(
        "swap",
        "torch",
        "addmm_ leaves the old adapter's rounding in the weight; ours has the bits of a new merge",
        "4.2 to 4.4 on AMD EPYC avx512_bf16",
    ),
    Known(
        "overhead-forward",
        "torch",
        "three bare products of 64 x 64 beside a module's call: fixed microseconds, no larger "
        "layer notices",
        "2.8 to 3.0 on AMD EPYC avx512_bf16",
    ),
)


def pairs(found: Iterable[Line]) -> list[Pair]:
    """Each provider of ours and the fastest peer that does the same work, the worst first.

    found: of one run. Compiled ones are set beside compiled ones.
    """
    fastest = []
    for ours, peers in _beside(found):
        judged = [line for line in peers if _known(ours, line) is None]
        if judged:
            fastest.append(Pair(ours, min(judged, key=_ratio)))
    return sorted(fastest, key=lambda pair: -pair.factor)


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
            f"over {bound:g}" if pair.factor > bound else "",
        ]
        for pair in found
    ]
    return ["case", "ours", "fastest peer", "times its time", ""], rows


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
    wanted = (work_of(ours), peer["provider"].removesuffix(_COMPILED))
    return next((known for known in KNOWN if (known.work, known.peer) == wanted), None)


def _ratio(line: Line) -> float:
    return line["ratio"]["p50"]
