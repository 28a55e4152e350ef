"""``python -m benchmarks.reports.summary DIR [DIR ...]``: every case in a line, for the docs.

Ratios of medians, smaller is better; with several folders (as of one thread and two) each cell has
a figure of every one. ``--headlines`` prints the short table instead: a few cases of each suite,
losses among them, as fastlora's time over the others'; bold where the intervals do not touch.
Folders of several machines stand side by side there.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.cases import SUITES
from benchmarks.harness import lines
from benchmarks.harness.case import BASE, YARDSTICK
from benchmarks.harness.lines import Line
from benchmarks.reports import markdown
from benchmarks.reports.comparison import WINS, Pair, is_rival

OURS, PEFT = "fastlora", "peft"
NAMED = (OURS, YARDSTICK, PEFT)
# Ways of plain torch, uncompiled: the fastest of a case counts.
TORCH = (YARDSTICK, "torch-gather", "torch-split")

# Work in words, and its case: wins and losses of every suite.
HEADLINES = (
    ("one row, bf16, 4096", "linear-forward-bf16-M1-K4096-N4096-R16"),
    ("512 rows, bf16, fp32 adapters, 2048", "linear-forward-bf16-M512-K2048-N2048-R16-lora_fp32"),
    ("the same with backward", "linear-train-bf16-M512-K2048-N2048-R16-lora_fp32"),
    ("the same, 1024", "linear-train-bf16-M512-K1024-N1024-R16-lora_fp32"),
    (
        "512 rows with backward, fp32, dropout, 1024",
        "linear-train-fp32-M512-K1024-N1024-R16-dropout0.1",
    ),
    ("32 rows of 32 adapters, bf16, 4096", "multi-decode-bf16-T32-K4096-N4096-R16-S32-distinct"),
    ("the same, 2048", "multi-decode-bf16-T32-K2048-N2048-R16-S32-distinct"),
    ("the same, 1024", "multi-decode-bf16-T32-K1024-N1024-R16-S32-distinct"),
    ("prefill, 8 x 128 of 16 adapters", "multi-prefill-bf16-B8-L128-K2048-N2048-R16-S16-uniform"),
    ("merge in place, bf16, for good", "merge-bf16-K2048-N2048-R16"),
    ("merge and take back", "merge-unmerge-bf16-K2048-N2048-R16"),
    (
        "small Llama, training step, dropout",
        "model-train-bf16-B2-L64-H384-I1024-layers2-R8-lora_fp32-dropout0.05",
    ),
    (
        "small Llama, generate, 8 adapters",
        "model-generate-fp32-B8-L8-new4-H384-I1024-layers2-R8-S8",
    ),
    ("a call's Python, no gradient", "overhead-forward-fp32-M1-K64-N64-R8"),
    ("a call's Python, with gradients", "overhead-train-fp32-M1-K64-N64-R8"),
)

Found = dict[tuple[str, str], Line]


def read(folder: Path) -> Found:
    """Reads lines with a ratio, by case and provider; suites in their order."""
    every = [line for suite in SUITES for line in lines.read(folder / f"{suite}.jsonl")]
    return {(ln["case"], ln["provider"]): ln for ln in every if "ratio" in ln}


def make_table(folders: Sequence[Found]) -> str:
    """Makes a row a case: the base's time, ratios, the fastest of all others, the limit."""
    heading = ("case", "base, ms", *NAMED, "another", "limit")
    cases = dict.fromkeys(case for folder in folders for case, _ in folder)
    return markdown.make_table(heading, [_make_row(case, folders) for case in cases])


def _make_row(case: str, folders: Sequence[Found]) -> list[str]:
    of = [{p: line for (c, p), line in folder.items() if c == case} for folder in folders]
    cells = [_join(f"{o[BASE]['ms']['p50']:.3g}" if BASE in o else "-" for o in of)]
    cells += [_join(_format_ratio(o.get(name)) for o in of) for name in NAMED]
    others = {p: line for o in of for p, line in o.items() if p not in NAMED and is_rival(p)}
    another = min(others, key=lambda p: others[p]["ratio"]["p50"], default=None)
    cells.append(
        f"{another}: {_join(_format_ratio(o.get(another)) for o in of)}" if another else ""
    )
    limits = [f"{o[OURS]['limit']:.2f}" for o in of if OURS in o]
    return [case, *cells, limits[0] if len(set(limits)) == 1 else _join(limits)]


def make_headlines(*machines: Sequence[Found], names: Sequence[str] = ()) -> str:
    """Makes a table of fastlora's time over the base's, torch's at its fastest, and PEFT's.

    Several machines stand side by side, under their names.
    """
    columns = [("the base's", (BASE,)), ("torch's", TORCH), ("PEFT's", (PEFT,))]
    rows = []
    for words, case in HEADLINES:
        cells = [
            _join(_compare(f, case, providers) for f in folders)
            for folders in machines
            for _, providers in columns
        ]
        rows.append([words, *cells])
    heading = [text for text, _ in columns] * len(machines)
    for place, name in enumerate(names):
        heading[place * len(columns)] = f"{name}: {columns[0][0]}"
    return markdown.make_table(("fastlora's time over", *heading), rows)


def _compare(lines: Found, case: str, names: Sequence[str]) -> str:
    ours, others = lines.get((case, OURS)), [lines[case, n] for n in names if (case, n) in lines]
    if ours is None or not others:
        return "-"
    pair = Pair(ours, min(others, key=lambda line: line["ratio"]["p50"]))
    text = f"{pair.factor:.2f}"
    return f"**{text}**" if pair.outcome == WINS else text


def _format_ratio(line: Line | None) -> str:
    return f"{line['ratio']['p50']:.2f}" if line else "-"


def _join(cells: Iterable[str]) -> str:
    return " / ".join(cells)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", metavar="DIR", nargs="+", type=Path)
    parser.add_argument("--headlines", action="store_true", help="the short table")
    options = parser.parse_args(argv)
    results = [read(folder) for folder in options.folders]
    empty = [folder for folder, each in zip(options.folders, results, strict=True) if not each]
    if empty:
        print(f"summary: expected results in {empty[0]}, found none", file=sys.stderr)
        return 2
    if not options.headlines:
        print(make_table(results))
        return 0
    machines: dict[Path, list[Found]] = {}
    for folder, found in zip(options.folders, results, strict=True):
        machines.setdefault(folder.resolve().parent, []).append(found)
    names = [_name(folder) for folder in machines] if len(machines) > 1 else []
    print(make_headlines(*machines.values(), names=names))
    return 0


def _name(machine: Path) -> str:
    """The maker of a machine's CPU, as its folder begins."""
    maker = machine.name.split("-")[0]
    return maker.upper() if len(maker) == 3 else maker.title()


if __name__ == "__main__":
    sys.exit(main())
