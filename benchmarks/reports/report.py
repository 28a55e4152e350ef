"""``report.md`` from a folder of results: where and how, who is ahead, tables and pictures."""

from __future__ import annotations

import os
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.harness import lines
from benchmarks.harness.lines import Line
from benchmarks.harness.work import BASE
from benchmarks.reports import plots, provenance, standing
from benchmarks.reports.markdown import bullets, ms, ratio, said, share, span, table
from benchmarks.reports.standing import EVEN, LOSES, OURS, PATHS, UNKNOWN, WINS, Pair, Standing

_READING = (
    "A ratio is a provider's time over the base's, formed within a round; in brackets is the 95 % "
    "bootstrap interval of its median. **Smaller is better.** `limit` is the least ratio that the "
    "ceilings measured in the same run allow; fastlora's share of it is the least time by those "
    "ceilings over its median: above 100 % is noise, or a cache. Memory is what a call holds at "
    "most beyond what was held before, its outputs among it, by torch's account, which on a CPU "
    "does not see the native library's scratch; 1 MB is 1,000,000 bytes. A `-` was not measured."
)
_LOST = (
    "Providers whose interval lies wholly below fastlora's, the greatest loss first. `slower by` "
    "is the ratio of the medians, `at least` that of the intervals' near ends."
)
_MERGED = (
    "Where a weight is ahead that one adapter was merged into beforehand, which leaves nothing to "
    "do but the base's work (counted in no loss above):"
)
_WON = "Beside the fastest of the others, whose interval lies wholly above fastlora's."
_MEMORY = (BASE, "peft", OURS)
# Of providers in tables; any other comes after them by name.
_ORDER = (OURS, "torch", "peft")


def write(folder: Path) -> list[Path]:
    """Writes ``report.md`` and its pictures beside the results in ``folder``; returns their paths.

    Without matplotlib the report is written without pictures and says so. Raises FileNotFoundError
    where the folder has no results, ValueError where they have no line or one that is none.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"folder: expected a folder of results, found none at {folder}")
    found = lines.read_all(folder)
    if not found:
        raise ValueError(f"folder: expected lines of results, found empty files in {folder}")
    missing, pictures = "", []
    try:
        pictures = plots.write(folder, found)
    except plots.NoMatplotlib as error:
        missing = str(error)
    report = folder / "report.md"
    new = report.with_suffix(".new")
    new.write_text(text(found, pictures, missing), encoding="utf-8")
    os.replace(new, report)
    return [report, *(picture.path for picture in pictures)]


def text(
    found: Sequence[Line], pictures: Sequence[plots.Picture] = (), no_pictures: str = ""
) -> str:
    """The report in Markdown. no_pictures: why there are none."""
    suites: dict[str, list[Line]] = {}
    for line in found:
        suites.setdefault(line["suite"], []).append(line)
    standings = standing.standings(found)
    parts = [
        f"# Benchmarks: {provenance.device(found)}",
        _summary(standings),
        _scores(standings),
        _READING,
        f"**No pictures:** {no_pictures}" if no_pictures else "",
        *provenance.section(found),
        *_losses(standings),
        *_wins(standings),
        *_rest(standings),
        *_images(pictures, ""),
    ]
    for suite, of_suite in suites.items():
        parts += [f"## Suite {suite}", *_images(pictures, suite), *_tables(of_suite)]
        parts += _not_timed(of_suite)
    return "\n\n".join(part for part in parts if part) + "\n"


def _summary(standings: Sequence[Standing]) -> str:
    count = Counter(s.outcome for s in standings)
    compared = len(standings) - count[UNKNOWN]
    many = f"{len(standings)} case{'s' if len(standings) > 1 else ''}"
    if not compared:
        return f"**In none of {many} could fastlora be compared with anyone else.**"
    of = many if compared == len(standings) else f"{compared} of {many} (the rest: not compared)"
    return (
        f"In {of}: fastlora is **slower than somebody in {count[LOSES]}**, faster than everyone "
        f"else in {count[WINS]}, and {count[EVEN]} are too close to call: there the 95 % intervals "
        "of the ratios touch."
    )


def _scores(standings: Sequence[Standing]) -> str:
    """fastlora beside each of the others."""
    pairs: dict[str, list[Pair]] = {}
    for pair in (pair for s in standings for pair in (*s.pairs, *s.merged)):
        pairs.setdefault(pair.other["provider"], []).append(pair)
    if not pairs:
        return ""
    heading = ["beside", "cases", "fastlora slower", "too close", "fastlora faster"]
    rows = []
    for name in sorted(pairs, key=_place):
        found = pairs[name]
        count = Counter(pair.outcome for pair in found)
        times = [pair.factor for pair in found]
        middle = f"{statistics.median(times):.2f}"
        middle += f" ({span(times)})" if len(times) > 1 else ""
        counts = [str(count[outcome]) for outcome in (LOSES, EVEN, WINS)]
        rows.append([name, str(len(found)), *counts, middle])
    return table([*heading, "fastlora's time over its: median (all)"], rows)


def _losses(standings: Sequence[Standing]) -> list[str]:
    """And where fastlora's own choice was not its best."""
    found = [(s.case, pair) for s in standings for pair in s.pairs if pair.outcome == LOSES]
    parts = ["## Where fastlora loses"]
    if found:
        parts += [_LOST, _pairs(found, "slower by")]
    elif any(s.pairs for s in standings):
        parts.append("Nowhere: in no case that could be compared is anyone ahead of fastlora.")
    else:
        parts.append("Nothing can be said of it: there is nothing to compare.")
    merged, paths = (
        [(s.case, pairs[0]) for s, pairs in each if pairs and pairs[0].outcome == LOSES]
        for each in (((s, s.merged) for s in standings), ((s, s.paths) for s in standings))
    )
    if merged:
        parts += [_MERGED, _pairs(merged, "slower by")]
    if paths:
        parts.append("Where one of fastlora's own paths is ahead of the one that it chose:")
        parts.append(_pairs(paths, "slower by"))
    return parts


def _wins(standings: Sequence[Standing]) -> list[str]:
    found = [(s.case, s.pairs[0]) for s in standings if s.outcome == WINS]
    if not found:
        return []
    return ["## Where fastlora wins", _WON, _pairs(found, "faster by")]


def _pairs(found: Iterable[tuple[str, Pair]], by: str) -> str:
    heading = ["case", "the other", by, "at least", "fastlora / base", "the other / base"]
    rows = [
        [
            case,
            _other(pair),
            f"{pair.by:.2f} ×",
            f"{pair.at_least:.2f} ×",
            ratio(pair.ours),
            ratio(pair.other),
        ]
        for case, pair in sorted(found, key=lambda each: -each[1].by)
    ]
    return table(heading, rows, left=2)


def _other(pair: Pair) -> str:
    ours, other = pair.ours["provider"], pair.other["provider"]
    return other if ours == OURS else f"{other}, beside {ours}"


def _rest(standings: Sequence[Standing]) -> list[str]:
    parts = []
    even = [f"`{s.case}`" for s in standings if s.outcome == EVEN]
    if even:
        parts += ["## Too close to call", ", ".join(even)]
    unknown = [f"`{s.case}`: {said(s.reason)}" for s in standings if s.outcome == UNKNOWN]
    if unknown:
        parts += ["## Not compared", bullets(unknown)]
    return parts


def _images(pictures: Sequence[plots.Picture], suite: str) -> list[str]:
    return [f"![{p.caption}]({p.path.name})" for p in pictures if p.suite == suite]


def _tables(of_suite: Sequence[Line]) -> list[str]:
    """One for each work: its providers differ from another's."""
    works: dict[str, list[Line]] = {}
    for line in of_suite:
        works.setdefault(standing.work_of(line), []).append(line)
    return [part for work, found in works.items() for part in (f"### {work}", *_work(found))]


def _work(of_work: Sequence[Line]) -> list[str]:
    """Everyone but our kernels' paths, which have a table of their own."""
    cases = standing.by_case(of_work)
    names = {name for found in cases.values() for name in found if name is not None}
    names.discard(BASE)
    paths = [name for name in PATHS if name in names]
    others = sorted(names.difference(paths), key=_place)
    heading = ["case", "base, ms", *others, "limit", "fastlora's share"]
    heading.append(f"peak, MB: {', '.join(_MEMORY)}")
    rows = []
    for case, found in cases.items():
        ours = found.get(OURS, {})
        limit = f"{ours['limit']:.3f}" if ours.get("limit") else "-"
        cells = [ratio(found.get(name)) for name in others]
        rows.append([case, ms(found.get(BASE)), *cells, limit, share(ours), _memory(found)])
    parts = [table(heading, rows)]
    if paths:
        shown = [OURS, *paths]
        rows = [[case, *(ratio(f.get(n)) for n in shown)] for case, f in cases.items()]
        rows = [row for row in rows if any(cell != "-" for cell in row[2:])]
        parts += ["fastlora along each of its paths, ratio to the base:"]
        parts.append(table(["case", *shown], rows))
    return parts


def _place(provider: str) -> tuple[int, str]:
    return (_ORDER.index(provider) if provider in _ORDER else len(_ORDER), provider)


def _memory(found: dict[str | None, Line]) -> str:
    peaks = [found.get(name, {}).get("peak_bytes") for name in _MEMORY]
    return ", ".join("-" if peak is None else f"{peak / 1e6:.3g}" for peak in peaks)


def _not_timed(of_suite: Sequence[Line]) -> list[str]:
    """Who has no figures, and why: the same reason once, with its cases."""
    why: dict[tuple[str, str, str], list[str]] = {}
    for line in of_suite:
        if line["status"] != "ok":
            who = line.get("provider") or "the case's process"
            key = (line["status"], who, said(line.get("reason")))
            why.setdefault(key, []).append(line["case"])
    if not why:
        return []
    every = len({line["case"] for line in of_suite})
    return [
        "Without figures:",
        bullets(
            f"`{who}` {status} in {_cases(named, every)}: {reason}"
            for (status, who, reason), named in sorted(why.items())
        ),
    ]


def _cases(named: Sequence[str], every: int) -> str:
    if len(named) == every > 1:
        return f"all {every} cases"
    shown = ", ".join(f"`{name}`" for name in named[:3])
    return shown + (f" and {len(named) - 3} more" if len(named) > 3 else "")
