"""``report.md`` from a folder of results: where and how, who is ahead, tables and pictures."""

from __future__ import annotations

import os
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.harness import lines
from benchmarks.harness.case import BASE
from benchmarks.harness.lines import Line
from benchmarks.reports import comparison, plots, provenance
from benchmarks.reports.comparison import EVEN, LOSES, OURS, PATHS, UNKNOWN, WINS, Pair, Standing
from benchmarks.reports.markdown import (
    format_ms,
    format_ratio,
    format_share,
    format_span,
    make_bullets,
    make_table,
    shorten,
)

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
    results = lines.read_all(folder)
    if not results:
        raise ValueError(f"folder: expected lines of results, found empty files in {folder}")
    missing, pictures = "", []
    try:
        pictures = plots.write(folder, results)
    except plots.NoMatplotlib as error:
        missing = str(error)
    report = folder / "report.md"
    new = report.with_suffix(".new")
    new.write_text(write_text(results, pictures, missing), encoding="utf-8")
    os.replace(new, report)
    return [report, *(picture.path for picture in pictures)]


def write_text(
    results: Sequence[Line], pictures: Sequence[plots.Picture] = (), no_pictures: str = ""
) -> str:
    """Writes the report in Markdown. no_pictures: why there are none."""
    suites: dict[str, list[Line]] = {}
    for line in results:
        suites.setdefault(line["suite"], []).append(line)
    standings = comparison.compare_all(results)
    parts = [
        f"# Benchmarks: {provenance.name_devices(results)}",
        _summarize(standings),
        _write_scores(standings),
        _READING,
        f"**No pictures:** {no_pictures}" if no_pictures else "",
        *provenance.write_section(results),
        *_write_losses(standings),
        *_write_wins(standings),
        *_write_undecided(standings),
        *_write_images(pictures, ""),
    ]
    for suite, of_suite in suites.items():
        parts += [f"## Suite {suite}", *_write_images(pictures, suite), *_write_tables(of_suite)]
        parts += _write_untimed(of_suite)
    return "\n\n".join(part for part in parts if part) + "\n"


def _summarize(standings: Sequence[Standing]) -> str:
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


def _write_scores(standings: Sequence[Standing]) -> str:
    """Writes the table of fastlora beside each other provider."""
    pairs: dict[str, list[Pair]] = {}
    for pair in (pair for s in standings for pair in (*s.pairs, *s.merged)):
        pairs.setdefault(pair.other["provider"], []).append(pair)
    if not pairs:
        return ""
    heading = ["beside", "cases", "fastlora slower", "too close", "fastlora faster"]
    rows = []
    for name in sorted(pairs, key=_sort_key):
        its_pairs = pairs[name]
        count = Counter(pair.outcome for pair in its_pairs)
        times = [pair.factor for pair in its_pairs]
        middle = f"{statistics.median(times):.2f}"
        middle += f" ({format_span(times)})" if len(times) > 1 else ""
        counts = [str(count[outcome]) for outcome in (LOSES, EVEN, WINS)]
        rows.append([name, str(len(its_pairs)), *counts, middle])
    return make_table([*heading, "fastlora's time over its: median (all)"], rows)


def _write_losses(standings: Sequence[Standing]) -> list[str]:
    """Writes what fastlora loses, and where its own choice was not its best path."""
    losses = [(s.case, pair) for s in standings for pair in s.pairs if pair.outcome == LOSES]
    parts = ["## Where fastlora loses"]
    if losses:
        parts += [_LOST, _write_pairs(losses, "slower by")]
    elif any(s.pairs for s in standings):
        parts.append("Nowhere: in no case that could be compared is anyone ahead of fastlora.")
    else:
        parts.append("Nothing can be said of it: there is nothing to compare.")
    merged, paths = (
        [(s.case, pairs[0]) for s, pairs in each if pairs and pairs[0].outcome == LOSES]
        for each in (((s, s.merged) for s in standings), ((s, s.paths) for s in standings))
    )
    if merged:
        parts += [_MERGED, _write_pairs(merged, "slower by")]
    if paths:
        parts.append("Where one of fastlora's own paths is ahead of the one that it chose:")
        parts.append(_write_pairs(paths, "slower by"))
    return parts


def _write_wins(standings: Sequence[Standing]) -> list[str]:
    wins = [(s.case, s.pairs[0]) for s in standings if s.outcome == WINS]
    if not wins:
        return []
    return ["## Where fastlora wins", _WON, _write_pairs(wins, "faster by")]


def _write_pairs(pairs: Iterable[tuple[str, Pair]], by: str) -> str:
    heading = ["case", "the other", by, "at least", "fastlora / base", "the other / base"]
    rows = [
        [
            case,
            _name_other(pair),
            f"{pair.by:.2f} ×",
            f"{pair.at_least:.2f} ×",
            format_ratio(pair.ours),
            format_ratio(pair.other),
        ]
        for case, pair in sorted(pairs, key=lambda each: -each[1].by)
    ]
    return make_table(heading, rows, word_columns=2)


def _name_other(pair: Pair) -> str:
    ours, other = pair.ours["provider"], pair.other["provider"]
    return other if ours == OURS else f"{other}, beside {ours}"


def _write_undecided(standings: Sequence[Standing]) -> list[str]:
    parts = []
    even = [f"`{s.case}`" for s in standings if s.outcome == EVEN]
    if even:
        parts += ["## Too close to call", ", ".join(even)]
    unknown = [f"`{s.case}`: {shorten(s.reason)}" for s in standings if s.outcome == UNKNOWN]
    if unknown:
        parts += ["## Not compared", make_bullets(unknown)]
    return parts


def _write_images(pictures: Sequence[plots.Picture], suite: str) -> list[str]:
    return [f"![{p.caption}]({p.path.name})" for p in pictures if p.suite == suite]


def _write_tables(of_suite: Sequence[Line]) -> list[str]:
    """Writes a table for each work, as works have different providers."""
    works: dict[str, list[Line]] = {}
    for line in of_suite:
        works.setdefault(comparison.name_work(line), []).append(line)
    return [
        part
        for work, work_lines in works.items()
        for part in (f"### {work}", *_write_work(work_lines))
    ]


def _write_work(of_work: Sequence[Line]) -> list[str]:
    """Writes a table of all providers, then one of our kernels' paths."""
    cases = comparison.group_by_case(of_work)
    names = {name for line_of in cases.values() for name in line_of if name is not None}
    names.discard(BASE)
    paths = [name for name in PATHS if name in names]
    others = sorted(names.difference(paths), key=_sort_key)
    heading = ["case", "base, ms", *others, "limit", "fastlora's share"]
    heading.append(f"peak, MB: {', '.join(_MEMORY)}")
    rows = []
    for case, line_of in cases.items():
        ours = line_of.get(OURS, {})
        limit = f"{ours['limit']:.3f}" if ours.get("limit") else "-"
        cells = [format_ratio(line_of.get(name)) for name in others]
        rows.append(
            [
                case,
                format_ms(line_of.get(BASE)),
                *cells,
                limit,
                format_share(ours),
                _format_memory(line_of),
            ]
        )
    parts = [make_table(heading, rows)]
    if paths:
        shown = [OURS, *paths]
        rows = [[case, *(format_ratio(f.get(n)) for n in shown)] for case, f in cases.items()]
        rows = [row for row in rows if any(cell != "-" for cell in row[2:])]
        parts += ["fastlora along each of its paths, ratio to the base:"]
        parts.append(make_table(["case", *shown], rows))
    return parts


def _sort_key(provider: str) -> tuple[int, str]:
    return (_ORDER.index(provider) if provider in _ORDER else len(_ORDER), provider)


def _format_memory(line_of: dict[str | None, Line]) -> str:
    peaks = [line_of.get(name, {}).get("peak_bytes") for name in _MEMORY]
    return ", ".join("-" if peak is None else f"{peak / 1e6:.3g}" for peak in peaks)


def _write_untimed(of_suite: Sequence[Line]) -> list[str]:
    """Writes which providers have no figures, and why: each reason once, with its cases."""
    why: dict[tuple[str, str, str], list[str]] = {}
    for line in of_suite:
        if line["status"] != "ok":
            who = line.get("provider") or "the case's process"
            key = (line["status"], who, shorten(line.get("reason")))
            why.setdefault(key, []).append(line["case"])
    if not why:
        return []
    every = len({line["case"] for line in of_suite})
    return [
        "Without figures:",
        make_bullets(
            f"`{who}` {status} in {_name_cases(named, every)}: {reason}"
            for (status, who, reason), named in sorted(why.items())
        ),
    ]


def _name_cases(named: Sequence[str], every: int) -> str:
    if len(named) == every > 1:
        return f"all {every} cases"
    shown = ", ".join(f"`{name}`" for name in named[:3])
    return shown + (f" and {len(named) - 3} more" if len(named) > 3 else "")
