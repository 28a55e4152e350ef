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
from benchmarks.reports.comparison import OURS, Pair, group_by_case, is_rival

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
        patterns = (
            (ours["case"], self.case),
            (ours["provider"], self.ours),
            (peer["provider"].removesuffix(_COMPILED), self.peer),
            (ours.get("instruction_set", ""), self.instructions),
        )
        return all(fnmatchcase(name, pattern) for name, pattern in patterns)


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
        "a row's bits do not depend on its batch, which no peer promises; without the permission "
        "for AMX ours has no tiles, and torch has",
        "6.8 on Intel Xeon avx512_bf16+amx, 512 rows",
        instructions="avx512*+amx",
    ),
    Known(
        "overhead-train-*",
        "*",
        "torch",
        "a module's call with gradients beside bare products of 64 x 64: fixed microseconds",
        "2.2 with one thread, 2.5 with two, on Intel Xeon amx_bf16+amx",
        instructions="*+amx",
    ),
)


def compute_times(pair: Pair) -> float:
    """Computes how many times as long ours takes; with one CPU thread by the lesser clock."""
    if (pair.ours["device"], pair.ours["threads"]) != ("cpu", 1):
        return pair.factor
    ours, other = (line["cpu_ratio"]["p50"] for line in (pair.ours, pair.other))
    return min(pair.factor, ours / other)


def pair_with_fastest(lines: Iterable[Line]) -> list[Pair]:
    """Pairs each provider of ours with the fastest peer that does the same work, the worst first.

    lines: of one run. Compiled providers are paired with compiled ones.
    """
    fastest = []
    for ours, peers in _pair_with_peers(lines):
        judged = [Pair(ours, line) for line in peers if _find_known(ours, line) is None]
        if judged:
            fastest.append(max(judged, key=compute_times))
    return sorted(fastest, key=compute_times, reverse=True)


def list_excused(lines: Iterable[Line]) -> list[tuple[Pair, Known]]:
    """Lists the pairs that ``KNOWN`` leaves out, and why."""
    every = [
        (Pair(ours, line), _find_known(ours, line))
        for ours, of in _pair_with_peers(lines)
        for line in of
    ]
    return [(pair, known) for pair, known in every if known is not None]


def list_missing(providers: Mapping[str, Iterable[str]], lines: Iterable[Line]) -> list[str]:
    """Lists ours that were not timed, and why. providers: all of a case's, by its name."""
    missing = []
    for case, line_of in group_by_case(lines).items():
        for name in filter(_is_judged, providers.get(case, ())):
            line = line_of.get(name) or line_of.get(None) or {"status": "left out", "reason": None}
            if "ratio" not in line:
                missing.append(f"{case}: {name} {line['status']}: {line.get('reason')}")
    return missing


def make_table(pairs: Sequence[Pair], bound: float) -> tuple[list[str], list[list[str]]]:
    """Returns heading and rows."""
    rows = [
        [
            pair.ours["case"],
            pair.ours["provider"],
            pair.other["provider"],
            f"{pair.factor:.2f}",
            f"{compute_times(pair):.2f}",
            f"over {bound:g}" if compute_times(pair) > bound else "",
        ]
        for pair in pairs
    ]
    return ["case", "ours", "fastest peer", "times its time", "judged by", ""], rows


def _pair_with_peers(lines: Iterable[Line]) -> Iterator[tuple[Line, list[Line]]]:
    """Yields every provider of ours that was timed, and its peers."""
    for line_of in group_by_case(lines).values():
        timed = {name: line for name, line in line_of.items() if name and "ratio" in line}
        ours = {name: _is_compiled(name) for name in timed if _is_judged(name)}
        for name, kind in ours.items():
            # Where nothing of ours is compiled, compiled peers are peers as well.
            kinds = {kind} if any(ours.values()) else {False, True}
            peers = (other for other in timed if is_rival(other) and _is_compiled(other) in kinds)
            yield timed[name], [timed[other] for other in peers]


def _is_compiled(provider: str) -> bool:
    return provider.endswith(_COMPILED)


def _is_judged(provider: str) -> bool:
    """Whether a provider is fastlora as users call it, not one forced path."""
    return provider.startswith(OURS)


def _find_known(ours: Line, peer: Line) -> Known | None:
    return next((known for known in KNOWN if known.covers(ours, peer)), None)
