"""Timing in turns: whatever else the machine does slows all providers alike.

A round times one call of every provider, in an order drawn anew; a ratio is taken within a round
and then summarised. Every call finds its operands cold: a provider goes round its
copies of them, and between two uses of a copy more memory is touched than a cache holds. On the
CPU it finds its code warm, as the layers before would leave it: each timed call follows two
untimed ones on other copies.
"""

from __future__ import annotations

import gc
import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from benchmarks.harness.case import Call

# More than the last-level caches it is meant to outrun: 50 to 60 MB on data-centre GPUs.
ROTATED_BYTES = 200 * 2**20
# For small layers, whose copies would be thousands and take a minute to build; a model's layers are
# in some cache too.
_MOST_COPIES = 200

_ROUNDS = (10, 300)
_RESAMPLES = 1000
# The slowest case still ends: fewer rounds than ten where ten take longer than this, but not fewer
# than five: of three rounds the bootstrap's 95 % interval held the median three times in four.
_LONGEST, _ROUNDS_AT_LEAST = 15.0, 5
_WARM_UP_ROUNDS, _WARM_UP_SECONDS = 3, 1.0
# A GPU's cycles in a second, from above: it idles for so many while the host gets ahead of it.
_CYCLES = 2.5e9


@dataclass
class Samples:
    """Milliseconds of each round: by the device's clock, and of this process's CPU time."""

    ms: list[float] = field(default_factory=list)
    cpu_ms: list[float] = field(default_factory=list)
    # By a GPU's clock: the share of rounds in which it began before the host had enqueued all, so
    # that some of the host's time is in the figure. None by the wall's.
    late: float | None = None


def count_copies(operand_bytes: int, providers: int) -> int:
    """Counts the copies of its operands that each provider needs to outrun the caches."""
    needed = math.ceil(ROTATED_BYTES / max(1, operand_bytes * providers))
    count = min(max(HostClock.TURN, needed), _MOST_COPIES)
    # A multiple of a turn's calls would time the same copies every turn.
    return count + (count % HostClock.TURN == 0)


def make_clock(
    device: str, *, host_only: bool = False, waits: bool = False
) -> HostClock | CudaClock:
    """Makes a clock. host_only: a GPU is not waited for. waits: every call waits for it."""
    if device == "cpu":
        return HostClock()
    if host_only or waits:
        wait = torch.cuda.synchronize
        return HostClock(wait, wait) if waits else HostClock(wait)
    return CudaClock()


def time_in_turns(
    calls: dict[str, list[Call]], device: str, seconds: float, **options: bool
) -> dict[str, Samples]:
    """Times every provider in turns. calls: one for each copy; options: ``make_clock``'s."""
    clock, order = make_clock(device, **options), random.Random(0)
    names = list(calls)
    rounds = _count_rounds(_warm_up(calls, clock) * clock.TURN, seconds)
    samples = {name: Samples() for name in names}
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for i in range(rounds):
            # So that no provider always follows the same neighbour.
            order.shuffle(names)
            for name in names:
                each = calls[name]
                turn = range(i * clock.TURN, (i + 1) * clock.TURN)
                clock.sample(name, *(each[j % len(each)] for j in turn))
            for name, (ms, cpu_ms) in clock.read().items():
                samples[name].ms.append(ms)
                samples[name].cpu_ms.append(cpu_ms)
    finally:
        if collecting:
            gc.enable()
    if isinstance(clock, CudaClock):
        for name, late in clock.late.items():
            samples[name].late = late / rounds
    return samples


def compute_spread(values: list[float]) -> dict[str, float]:
    """Computes the median, and the quantiles that hold three fifths of the samples."""
    p20, p50, p80 = np.percentile(values, (20, 50, 80)).tolist()
    return {"p20": p20, "p50": p50, "p80": p80}


def compute_interval(values: list[float]) -> dict[str, float]:
    """Computes the median's 95 % interval by the percentile bootstrap (Efron 1979) over rounds."""
    drawn = np.random.default_rng(0).choice(values, (_RESAMPLES, len(values)))
    low, high = np.percentile(np.median(drawn, axis=1), (2.5, 97.5)).tolist()
    return {"low": low, "high": high}


def compute_ratios(samples: list[float], base: list[float]) -> list[float]:
    """Computes ratios round by round."""
    return [ours / theirs for ours, theirs in zip(samples, base, strict=True)]


def _warm_up(calls: dict[str, list[Call]], clock: HostClock | CudaClock) -> float:
    """Warms up; returns the seconds of the last untimed round."""
    began, a_round = time.perf_counter(), 0.0
    for i in range(_WARM_UP_ROUNDS):
        started = time.perf_counter()
        for name, each in calls.items():
            clock.warm_up(name, each[i % len(each)])
        a_round = time.perf_counter() - started
        if time.perf_counter() - began > _WARM_UP_SECONDS:
            break
    return a_round


def _count_rounds(a_round: float, seconds: float) -> int:
    affordable = min(max(int(seconds / a_round), _ROUNDS[0]), _ROUNDS[1])
    return max(_ROUNDS_AT_LEAST, min(affordable, int(_LONGEST / a_round)))


class HostClock:
    """Wall clock and CPU time of this process."""

    # Calls in a turn; the last is timed. With one untimed call before it a small layer's time still
    # depended on the turn before (1.25 to 1.56 of the base), with two it is that of eight (1.11).
    TURN = 3

    def __init__(
        self,
        settle: Callable[[], object] = lambda: None,
        finish: Callable[[], object] = lambda: None,
    ) -> None:
        """settle: called before the clock starts, and finish before it ends: to wait for a GPU."""
        self._settle, self._finish = settle, finish
        self._round: dict[str, tuple[float, float]] = {}

    def warm_up(self, name: str, call: Call) -> None:
        call()

    def sample(self, name: str, *calls: Call) -> None:
        *before, call = calls
        for each in before:
            each()
        self._settle()
        cpu, wall = time.process_time_ns(), time.perf_counter_ns()
        call()
        self._finish()
        wall, cpu = time.perf_counter_ns() - wall, time.process_time_ns() - cpu
        self._round[name] = (wall / 1e6, cpu / 1e6)

    def read(self) -> dict[str, tuple[float, float]]:
        return self._round


class CudaClock:
    """Events around each call; the GPU idles until the host has enqueued it, so the time between
    them is the GPU's own. A call that waits for the device inside is charged for the wait."""

    TURN = 1

    def __init__(self) -> None:
        self.late: dict[str, int] = {}
        self._ahead: dict[str, float] = {}
        self._round: dict[str, tuple[torch.cuda.Event, torch.cuda.Event, float]] = {}

    def warm_up(self, name: str, call: Call) -> None:
        torch.cuda.synchronize()
        started = time.perf_counter()
        call()
        self._ahead[name] = min(time.perf_counter() - started, 0.005)
        torch.cuda.synchronize()

    def sample(self, name: str, *calls: Call) -> None:
        (call,) = calls
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # The same for all: a GPU that idles longer cools and changes its speed.
        torch.cuda._sleep(int(1.5 * max(self._ahead.values()) * _CYCLES) + 20_000)
        start.record()
        cpu = time.process_time_ns()
        call()
        cpu = time.process_time_ns() - cpu
        self.late[name] = self.late.get(name, 0) + start.query()
        end.record()
        self._round[name] = (start, end, cpu / 1e6)

    def read(self) -> dict[str, tuple[float, float]]:
        torch.cuda.synchronize()
        return {
            name: (start.elapsed_time(end), cpu) for name, (start, end, cpu) in self._round.items()
        }
