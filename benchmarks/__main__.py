"""``python -m benchmarks``: measure, print, and leave the results in benchmarks/results/.

Exit code: 0 when every provider passed its gate or was absent, 1 when one failed or a process died,
2 when there was nothing to run or no such device.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from benchmarks import cases, machine, one, runner, table
from benchmarks.work import Case

_RESULTS = Path(__file__).parent / "results"


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    if args.list:
        for case in _select(args):
            print(f"{case.suite:<8} {case.name}{'  (quick)' if case.quick else ''}")
        return 0
    if args.device == "cuda" and not torch.cuda.is_available():
        return _refuse(f"--device cuda: torch {torch.__version__} finds no usable CUDA GPU here")
    if args.threads:
        torch.set_num_threads(args.threads)
    folder = machine.folder_name(args.device) + ("-quick" if args.quick else "")
    where = (args.save or _RESULTS) / folder
    if args.show:
        files = [where / f"{suite}.jsonl" for suite in cases.SUITES]
        print(table.markdown([line for file in files for line in runner.read(file)]))
        return 0
    if args.one:
        return _one(args)
    chosen = _select(args)
    if not chosen:
        return _refuse("no case matches; --list shows their names")
    threads = torch.get_num_threads()
    print(f"{machine.device_name(args.device)}, torch {torch.__version__}, {threads} CPU threads")
    print(f"results in {where}")
    options = ["--threads", str(threads), *(["--quick"] if args.quick else [])]
    good = runner.run(chosen, where, options, timeout=args.timeout)
    if not good:
        print("\nbenchmarks: not everything passed; see the lines above", file=sys.stderr)
    return 0 if good else 1


def _one(args: argparse.Namespace) -> int:
    """Cases in this process, their lines to a file or standard output."""
    chosen = []
    for name in args.one:
        found = cases.select(args.device, name=name)
        if len(found) != 1:
            return _refuse(f"--one: {len(found)} cases are called {name!r}; --list shows them")
        chosen += found
    seconds = one.QUICK_SECONDS if args.quick else one.SECONDS
    for case in chosen:
        for line in one.measure(case, seconds=seconds):
            one.write({**line, "quick": args.quick}, args.out)
        if args.out is not None:
            print(f"{runner.FINISHED}{case.name}", flush=True)
    return 0


def _select(args: argparse.Namespace) -> list[Case]:
    return cases.select(
        args.device, suite=args.suite, name=args.case, quick=args.quick, full=args.full
    )


def _refuse(why: str) -> int:
    print(f"benchmarks: {why}", file=sys.stderr)
    return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="fewer cases, less time for each")
    parser.add_argument("--full", action="store_true", help="the rarer shapes too")
    parser.add_argument("--suite", choices=cases.SUITES)
    parser.add_argument("--case", metavar="GLOB", default="*", help="cases whose name matches")
    parser.add_argument("--list", action="store_true", help="name the cases and stop")
    parser.add_argument("--show", action="store_true", help="print the stored ratios and stop")
    parser.add_argument("--save", metavar="DIR", type=Path, help="instead of benchmarks/results")
    parser.add_argument("--threads", metavar="N", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--timeout", metavar="S", type=float, default=120.0, help="for each case")
    parser.add_argument(
        "--one", metavar="NAME", action="append", help="measure this case in this very process"
    )
    parser.add_argument("--out", metavar="FILE", type=Path, help="with --one: where its lines go")
    return parser


if __name__ == "__main__":
    sys.exit(main())
