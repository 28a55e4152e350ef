"""One case in this process: gate, then timing, one line of results for every provider."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import fastlora
from benchmarks import gate, machine, timer
from benchmarks.work import BASE, Case, Operands

SEED = 0
SECONDS, QUICK_SECONDS = 1.5, 0.3

Line = dict[str, Any]


def identity(case: Case) -> Line:
    """What a line says of its case, whatever became of it."""
    return {
        "suite": case.suite,
        "case": case.name,
        "device": case.device,
        "dtype": case.dtype,
        "lora_dtype": case.lora_dtype or case.dtype,
        "shape": dict(case.shape),
        "workload": case.workload or None,
        "dropout": case.dropout,
        "timestamp": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def measure(case: Case, *, seed: int = SEED, seconds: float = SECONDS) -> Iterator[Line]:
    """Lines of those who did not pass, before anything is timed; then of the others."""
    where = machine.facts(case.device) | {
        "seed": seed,
        "backend": fastlora.backend(device=case.device),
    }
    verdicts = gate.check(case, seed)
    lines = {name: _line(case, name, verdict) | where for name, verdict in verdicts.items()}
    passed = [name for name, verdict in verdicts.items() if verdict.status == "ok"]
    yield from (lines[name] for name in verdicts if name not in passed)
    if not passed:
        return

    operands = case.work.operands(case, seed)
    count = timer.copies(sum(t.nbytes for t in operands.values()), len(passed))
    build = case.providers
    calls = {name: [build[name](case, _copy(operands)) for _ in range(count)] for name in passed}
    samples = timer.interleaved(calls, case.device, seconds)
    base = samples.get(BASE)
    for name in passed:
        yield lines[name] | _timing(lines[name], samples[name], base) | {"copies": count}


def write(line: Line, file: Path | None) -> None:
    """Appends the line in one piece, or prints it where there is no file."""
    text = json.dumps(_finite(line), allow_nan=False)
    if file is None:
        print(text, flush=True)
        return
    # One write to the end: a kill leaves whole lines behind.
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(descriptor, (text + "\n").encode())
    finally:
        os.close(descriptor)


def _copy(operands: Operands) -> Operands:
    return {k: t.detach().clone().requires_grad_(t.requires_grad) for k, t in operands.items()}


def _line(case: Case, provider: str, verdict: gate.Verdict) -> Line:
    flops, moved = case.work.cost(case, provider)
    limit = case.work.limit(case, provider) if case.device == "cuda" and flops else None
    errors = {k: {"error": e, "bound": b} for k, (e, b) in verdict.errors.items()}
    return {
        **identity(case),
        "provider": provider,
        "status": verdict.status,
        "reason": verdict.reason or None,
        "gate": errors,
        "flops": flops,
        "bytes": moved,
        "limit": limit,
    }


def _timing(line: Line, samples: timer.Samples, base: timer.Samples | None) -> Line:
    ms = timer.spread(samples.ms)
    timing: Line = {
        "clock": "CUDA events" if line["device"] == "cuda" else "wall",
        "rounds": len(samples.ms),
        "ms": ms,
        "cpu_ms": timer.spread(samples.cpu_ms),
        "tflops": line["flops"] / ms["p50"] / 1e9,
        "gbps": line["bytes"] / ms["p50"] / 1e6,
    }
    if base is not None:
        timing["ratio"] = timer.spread(timer.ratios(samples.ms, base.ms))
        timing["cpu_ratio"] = timer.spread(timer.ratios(samples.cpu_ms, base.cpu_ms))
    return timing


def _finite(value: Any) -> Any:
    """JSON has no NaN: what is not finite is written as text."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
