"""One case in this process: gate, then timing, one line of results for every provider."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timezone

import torch

from benchmarks.harness import gate, machine, memory, timer
from benchmarks.harness.case import (
    BASE,
    DTYPES,
    Call,
    Case,
    Ceilings,
    Operands,
    Outputs,
    copy_operands,
)
from benchmarks.harness.lines import Line
from fastlora.ops import dispatch

SEED = 0
SECONDS, QUICK_SECONDS = 1.5, 0.3

# Written to every line; docs/benchmarks.md explains it.
METHOD = (
    "every provider is held to float64 before it is timed (gate); warm-up; providers take turns, "
    "in another order each round; on a CPU a turn is three calls, the last is timed; copies of "
    "the operands rotate past the caches (copies); a ratio is formed within its round; low to high "
    "is the 95 % percentile bootstrap of its median; ceilings are a copy's, a sum's and the "
    "library's products', measured in this run; share is the least time by them over p50"
)


def describe_case(case: Case) -> Line:
    """Describes the case, for every line about it."""
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


def measure(
    case: Case, ceilings: Ceilings, *, seed: int = SEED, seconds: float = SECONDS
) -> Iterator[Line]:
    """Yields lines of providers that failed the gate, before timing; then those of the others."""
    facts = machine.collect_facts(case.device) | {
        "seed": seed,
        "backend": _choose_backend(case),
        "method": METHOD,
        "ceilings": ceilings._asdict(),
    }
    verdicts = gate.check(case, seed)
    lines = {name: _make_line(case, name, verdict) | facts for name, verdict in verdicts.items()}
    passed = [name for name, verdict in verdicts.items() if verdict.status == "ok"]
    yield from (lines[name] for name in verdicts if name not in passed)
    if not passed:
        return

    operands = case.work.operands(case, seed)
    count, build = _count_copies(case, operands, len(passed)), case.providers
    calls = {
        name: [_repeat(case, build[name](case, copy_operands(operands))) for _ in range(count)]
        for name in passed
    }
    clock_options = {"host_only": case.work.host_only, "waits": case.work.waits}
    samples = timer.time_in_turns(calls, case.device, seconds, **clock_options)
    clocks, base = machine.read_clocks(case.device), samples.get(BASE)
    # Memory tracking slows the call, so it is a run of its own.
    peaks = {name: memory.measure_peak(calls[name][0], case.device) for name in passed}
    for name in passed:
        least = case.work.least(case, name, ceilings), case.work.least(case, BASE, ceilings)
        yield {
            **lines[name],
            **_make_timing(case, lines[name], samples[name], base, least),
            "peak_bytes": peaks[name],
            "copies": count,
            "clocks": clocks,
        }


def _choose_backend(case: Case) -> str:
    """Returns the backend that fastlora chooses for the case's op and dtypes."""
    dtypes = DTYPES[case.dtype], DTYPES[case.lora_dtype or case.dtype]
    with dispatch.quietly():
        return dispatch.choose(case.work.op, torch.device(case.device), *dtypes)


def _count_copies(case: Case, operands: Operands, providers: int) -> int:
    """Counts each provider's copies of operands: enough to outrun caches, except for host time."""
    if case.work.host_only:
        return timer.HostClock.TURN
    return timer.count_copies(sum(t.nbytes for t in operands.values()), providers)


def _repeat(case: Case, call: Call) -> Call:
    """Returns what a sample times: the call, as often as its work says."""
    many = range(case.work.calls)
    if len(many) == 1:
        return call

    def calls() -> Outputs:
        for _ in many:
            outputs = call()
        return outputs

    return calls


def _make_line(case: Case, provider: str, verdict: gate.Verdict) -> Line:
    flops, moved = case.work.cost(case, provider)
    errors = {k: {"error": e, "bound": b} for k, (e, b) in verdict.errors.items()}
    return {
        **describe_case(case),
        "provider": provider,
        "status": verdict.status,
        "reason": verdict.reason or None,
        "gate": errors,
        "flops": flops,
        "bytes": moved,
    }


def _make_timing(
    case: Case,
    line: Line,
    samples: timer.Samples,
    base: timer.Samples | None,
    least: tuple[float, float],
) -> Line:
    """Makes a line's times. least: seconds that the ceilings allow the provider and the base."""
    calls = case.work.calls
    ms, cpu_ms = ([t / calls for t in each] for each in (samples.ms, samples.cpu_ms))
    spread = timer.compute_spread(ms)
    timing: Line = {
        "clock": "CUDA events" if samples.late is not None else "wall",
        "late": samples.late,
        "rounds": len(ms),
        "calls": calls,
        "ms": spread,
        "cpu_ms": timer.compute_spread(cpu_ms),
        "tflops": line["flops"] / spread["p50"] / 1e9,
        "gbps": line["bytes"] / spread["p50"] / 1e6,
        "share": least[0] * 1e3 / spread["p50"],
    }
    if base is not None:
        ratios = timer.compute_ratios(samples.ms, base.ms)
        timing["ratio"] = timer.compute_spread(ratios) | timer.compute_interval(ratios)
        timing["cpu_ratio"] = timer.compute_spread(
            timer.compute_ratios(samples.cpu_ms, base.cpu_ms)
        )
        timing["limit"] = least[0] / least[1]
    return timing
