"""``fastlora bench`` and ``python -m benchmarks``: measure, print, and keep the results.

Exit code: 0 when every provider passed its gate or was absent and nothing is slower than what it is
compared with; 1 when one failed, a process died, or ours became slower or is over the bound; 2 when
there was nothing to run, to compare with or to report, or no such device.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import RESULTS, cases, judge
from benchmarks.harness import ceilings, lines, machine, measurement, runner, terminal
from benchmarks.harness.case import DTYPES, Case, Ceilings
from benchmarks.reports import earlier_results, targets


def main(argv: Sequence[str] | None = None, prog: str = "python -m benchmarks") -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["report"]:
        return _write_report(argv[1:], prog)
    if argv[:1] == ["targets"]:
        return targets.main(argv[1:], f"{prog} targets")
    args = _make_parser(prog).parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available() and not args.list:
        return _refuse(f"--device cuda: torch {torch.__version__} finds no usable CUDA GPU here")
    if args.tolerate_slower and not args.compare:
        return _refuse("--tolerate-slower: expected --compare with it")
    try:
        chosen = _select(args)
    except ValueError as error:
        return _refuse(str(error))
    if args.list:
        for case in chosen:
            print(f"{case.suite:<8} {case.name}{'  (quick)' if case.quick else ''}")
        return 0
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if args.one:
        return _run_here(args, chosen)
    if not chosen:
        return _refuse("no case matches; --list shows their names")
    return _run(args, chosen)


def _run(args: argparse.Namespace, chosen: list[Case]) -> int:
    began = time.monotonic()
    try:
        then, why = earlier_results.find(args.compare, args.device) if args.compare else ([], "")
    except (OSError, ValueError) as error:
        return _refuse(f"--compare: {error}")
    kind = "-quick" if args.quick else "-shapes" if args.shapes else ""
    folder = (args.save or RESULTS) / (machine.name_folder(args.device) + kind)
    threads = torch.get_num_threads()
    name = machine.find_device_name(args.device)
    name += f" ({machine.find_instruction_set()})" if args.device == "cpu" else ""
    print(f"{name}, torch {torch.__version__}, {threads} CPU threads")
    options = ["--threads", str(threads), *(["--quick"] if args.quick else [])]
    if args.shapes:
        options += ["--shapes", *(",".join(map(str, shape)) for shape in args.shapes)]
        options += ["--dtype", *(args.dtype or ["bf16"])]
    remaining = chosen
    if args.resume:
        facts = machine.collect_facts(args.device)
        remaining = [case for case in chosen if not runner.is_done(case, folder, facts)]
    with terminal.open_screen(len(remaining)) as shown:
        good = runner.run(remaining, folder, options, args.timeout, shown, args.deadline)
        measured = judge.Run(chosen, folder, options, args.timeout, shown)
        if args.max_over_peers is not None:
            good &= judge.judge_by_peers(measured, args.max_over_peers)
        if then:
            good &= judge.judge_by_earlier(measured, then, tolerate=args.tolerate_slower)
    if why:
        print(f"\n{why}")
    print(f"\nresults in {folder}; a report with pictures: fastlora bench report {folder}")
    took = f"{len(remaining)} cases in {time.monotonic() - began:.0f} s"
    if good:
        print(f"{took}: nothing failed")
    else:
        print(f"\nbenchmarks: {took}: not everything passed; see above", file=sys.stderr)
    return 0 if good else 1


def _run_here(args: argparse.Namespace, chosen: list[Case]) -> int:
    """Measures cases in this process, their lines to a file or standard output."""
    by_name = {case.name: case for case in chosen}
    missing = [name for name in args.one if name not in by_name]
    if missing:
        return _refuse(f"--one: no case is called {missing[0]!r}; --list shows them")
    measured = [by_name[name] for name in args.one]
    seen = (
        Ceilings(**args.ceilings)
        if args.ceilings
        else ceilings.measure(args.device, {case.dtype for case in measured})
    )
    seconds = measurement.QUICK_SECONDS if args.quick else measurement.SECONDS
    began = time.monotonic()
    for case in measured:
        if args.deadline is not None and time.monotonic() - began > args.deadline:
            print(runner.OUT_OF_TIME)
            break
        for line in measurement.measure(case, seen, seconds=seconds):
            lines.write({**line, "quick": args.quick}, args.out)
        if args.out is not None:
            print(f"{runner.FINISHED}{case.name}", flush=True)
    return 0


def _select(args: argparse.Namespace) -> list[Case]:
    if args.shapes:
        dtypes = args.dtype or ["bf16"]
        return cases.make_custom(args.device, args.suite or "linear", args.shapes, dtypes)
    if args.dtype:
        raise ValueError("--dtype: expected --shapes with it; the list's cases have theirs")
    # A name that was asked for is enough, whatever else would leave it out.
    every = bool(args.one) or args.full
    return cases.select(
        args.device,
        suite=args.suite,
        name=args.case,
        quick=args.quick and not args.one,
        full=every,
    )


def _write_report(argv: Sequence[str], prog: str) -> int:
    parser = argparse.ArgumentParser(
        prog=f"{prog} report", description="Writes Markdown, tables and pictures of results."
    )
    parser.add_argument("folder", metavar="DIR", type=Path, help="where results were kept")
    folder: Path = parser.parse_args(argv).folder
    folders = sorted(
        {file.parent for suite in cases.SUITES for file in folder.rglob(f"{suite}.jsonl")}
    )
    if not folders:
        return _refuse(f"report: expected results such as linear.jsonl, found none in {folder}")
    from benchmarks.reports import report

    try:
        for result_folder in folders:
            for path in report.write(result_folder):
                print(path)
    except (OSError, ValueError) as error:
        return _refuse(f"report: {error}")
    return 0


def _refuse(reason: str) -> int:
    print(f"benchmarks: {reason}", file=sys.stderr)
    return 2


def _parse_positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return value


def _parse_count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of 1 or more, got {text!r}")
    return int(text)


def _parse_shape(text: str) -> tuple[int, ...]:
    try:
        shape = tuple(int(size) for size in text.split(","))
    except ValueError:
        shape = ()
    if len(shape) not in (4, 5) or min(shape) < 1:
        raise argparse.ArgumentTypeError(
            f"expected M,K,N,R or M,K,N,R,S, whole numbers of 1 or more, got {text!r}"
        )
    return shape


def _make_parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, description=_describe(), epilog=_EPILOG)
    parser.add_argument("suite", nargs="?", choices=cases.SUITES, help="default: all of them")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=_find_device())
    parser.add_argument("--quick", action="store_true", help="fewer cases, less time for each")
    parser.add_argument("--full", action="store_true", help="the rarer shapes too")
    parser.add_argument(
        "--shapes", metavar="M,K,N,R", nargs="+", type=_parse_shape,
        help="these instead of the list's, of linear, multi (its adapters a fifth number) or merge",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", nargs="+", choices=tuple(DTYPES), help="of --shapes (default: bf16)"
    )
    parser.add_argument("--save", metavar="DIR", type=Path, help="default: benchmarks/results")
    parser.add_argument(
        "--compare", metavar="PATH", type=Path,
        help="earlier results, a file, a folder or several devices': ours must not be slower",
    )  # fmt: skip
    parser.add_argument(
        "--tolerate-slower", action="store_true", help="than --compare: shown, and no failure"
    )
    parser.add_argument(
        "--max-over-peers", metavar="X", type=_parse_positive,
        help="ours may take X times as long as the fastest peer of this run",
    )  # fmt: skip
    parser.add_argument("--case", metavar="GLOB", default="*", help="cases whose name matches")
    parser.add_argument("--list", action="store_true", help="name the cases and stop")
    parser.add_argument(
        "--threads", metavar="N", type=_parse_count, help="of the CPU (default: torch's)"
    )
    parser.add_argument(
        "--timeout", metavar="S", type=_parse_positive, default=180, help="for each case"
    )
    parser.add_argument(
        "--deadline", metavar="S", type=_parse_positive, help="begin no case after that"
    )
    parser.add_argument("--resume", action="store_true", help="skip what this commit has measured")
    inner = parser.add_argument_group("one case in this very process")
    inner.add_argument("--one", metavar="NAME", action="append")
    inner.add_argument("--out", metavar="FILE", type=Path, help="where its lines go")
    inner.add_argument("--ceilings", metavar="JSON", type=json.loads, help="measured beforehand")
    return parser


_EPILOG = (
    "Instead of a suite: `report DIR` writes Markdown and pictures of what was kept in DIR, "
    "`targets [DIR]` says which of the project's targets it meets."
)


def _describe() -> str:
    return "Measures fastlora beside its peers: who disagrees with float64 fails and is not timed."


def _find_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
