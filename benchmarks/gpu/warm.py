"""``python -m benchmarks.gpu.warm``: compiles what the benchmarks will run, in many processes.

Calls every provider of every case once, so that triton's and inductor's caches have what a later
process needs. Cases that share kernels are one family, which one process compiles. Nothing is timed
or compared: errors are counted, and the benchmarks report them.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from benchmarks import ROOT, cases
from benchmarks.harness.case import DTYPES, Absent, Case
from benchmarks.harness.measurement import SEED

# Seconds past the deadline that a case begun before it may take.
_LATE = 5.0


def name_family(case: Case) -> str:
    """Names the kernels that cases share: by suite, dtypes and ranks."""
    adapters = f"R{case.shape.get('R', 0)}{case.ranks}-{case.lora_dtype or case.dtype}"
    return f"{case.suite}-{case.dtype}-{adapters}"


def group_by_family(chosen: Sequence[Case]) -> dict[str, list[Case]]:
    """Groups cases by family, the largest first, as it takes longest."""
    families: dict[str, list[Case]] = {}
    for case in chosen:
        families.setdefault(name_family(case), []).append(case)
    return dict(sorted(families.items(), key=lambda item: -len(item[1])))


def call_all(chosen: Sequence[Case], until: float) -> dict[str, Any]:
    """Calls each provider of each case once, on this process's share of the device."""
    counts: dict[str, Any] = {"called": 0, "absent": 0, "raised": {}, "left": 0}
    for number, case in enumerate(chosen):
        if time.monotonic() > until:
            counts["left"] = len(chosen) - number
            break
        blank = _Blank(**vars(case))
        # The gate may compare another, smaller case.
        gated = case.work.gated(blank)
        for each in (blank,) if gated.name == blank.name else (gated, blank):
            _call_case(each, counts)
    return counts


class _Blank(Case):
    """The same case on zeros, which take no time to draw; kernels know shapes alone."""

    def tensor(self, draw: torch.Generator, *shape: int, scale: float = 1.0) -> Tensor:
        return torch.zeros(shape, device=self.device, dtype=DTYPES[self.dtype])


def _call_case(case: Case, counts: dict[str, Any]) -> None:
    operands = case.work.operands(case, SEED)
    for name, build in case.providers.items():
        # Copies, since some providers write to their operands.
        copies = {
            k: t.detach().clone().requires_grad_(t.requires_grad) for k, t in operands.items()
        }
        try:
            build(case, copies)()
            if case.device == "cuda":
                torch.cuda.synchronize()
            counts["called"] += 1
        except Absent:
            counts["absent"] += 1
        except Exception as error:
            counts["raised"][f"{case.name}, {name}"] = f"{type(error).__name__}: {error}"[:200]
        del copies
        gc.collect()
        if case.device == "cuda":
            torch.cuda.empty_cache()


def _warm_family(
    name: str, options: argparse.Namespace, until: float
) -> tuple[str, dict[str, Any]]:
    """Warms a family in a process of its own; returns its name and counts."""
    remaining = until - time.monotonic()
    if remaining <= 0:
        return name, {"died": "out of time"}
    command = [sys.executable, "-m", "benchmarks.gpu.warm", "--device", options.device]
    command += ["--family", name, "--deadline", str(remaining), "--case", options.case]
    command += [f"--{flag}" for flag in ("quick", "full") if getattr(options, flag)]
    # There are enough processes already.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    limit = None if remaining == float("inf") else remaining + _LATE
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=limit
        )
    except subprocess.TimeoutExpired:
        return name, {"died": "out of time within a case"}
    if done.returncode:
        errors = done.stderr.strip().splitlines() or ["it said nothing"]
        return name, {"died": f"exit code {done.returncode}: {errors[-1]}"}
    try:
        return name, json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        return name, {"died": f"it said {done.stdout.strip()[-200:]!r}"}


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 whatever a provider did, 2 without such a device."""
    options = make_parser().parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        print(f"benchmarks.gpu.warm: torch {torch.__version__} finds no usable CUDA GPU here",
              file=sys.stderr)  # fmt: skip
        return 2
    until = time.monotonic() + options.deadline
    shares = group_by_family(
        cases.select(options.device, name=options.case, quick=options.quick, full=options.full)
    )
    if options.family:
        torch.set_num_threads(1)
        print(json.dumps(call_all(shares[options.family], until)))
        return 0
    with ThreadPoolExecutor(options.jobs) as pool:
        for name, counts in pool.map(lambda name: _warm_family(name, options, until), shares):
            print(f"{name} ({len(shares[name])} cases): {_describe_counts(counts)}", flush=True)
    return 0


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.warm", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--quick", action="store_true", help="the quick cases alone")
    parser.add_argument("--full", action="store_true", help="the rarer shapes too")
    parser.add_argument("--case", metavar="GLOB", default="*", help="cases whose name matches")
    parser.add_argument("--deadline", metavar="S", type=float, default=float("inf"))
    parser.add_argument("--family", help="this one, in this very process")
    return parser


def _describe_counts(counts: dict[str, Any]) -> str:
    if "died" in counts:
        return counts["died"]
    text = f"{counts['called']} called, {counts['absent']} absent, {len(counts['raised'])} raised"
    text += f", {counts['left']} cases left" if counts["left"] else ""
    return "\n  ".join([text, *(f"{where}: {why}" for where, why in counts["raised"].items())])


if __name__ == "__main__":
    sys.exit(main())
