"""What a path costs by arithmetic, in µs: what decides where nothing was measured.

Each path is bytes over bandwidth or flops over throughput, whichever is more, and its launches. The
machines are about three quarters of their data sheets: only ratios of paths are read from them.
"""

from __future__ import annotations

from typing import NamedTuple

from fastlora.kernels.tile.configs import rank_tile

PATHS = ("one_pass", "two_pass", "overlapped", "library")
# Of many adapters; without a base product there is one.
MULTI_PATHS = ("decode", "decode_beside", "prefill", "prefill_beside", "library", "added")


class Machine(NamedTuple):
    bandwidth: float  # bytes a µs, read and written
    flops: float  # of half-precision products, a µs
    launch: float  # µs between the end of a kernel and the start of the next


MACHINES = {
    80: Machine(1.5e6, 2.3e8, 2.0),
    90: Machine(3.0e6, 7.9e8, 2.0),
    100: Machine(6.0e6, 1.7e9, 2.0),
}


class Problem(NamedTuple):
    """A product of x (M, K) and w (K, N) with rank R, of elements of ``size`` bytes."""

    M: int
    K: int
    N: int
    R: int
    size: int
    weight: bool = True  # whether there is a base product
    lora_size: int = 0  # bytes of an element of the adapters; 0: the same
    masked: str = ""  # "x" or "y": where dropout is
    precise: bool = False  # float32 without tensor cores
    slots: int | None = None  # of many adapters: how many there are


# What our products reach of the library's rate: assumed. Ours without tensor cores are plain loops.
OURS, OURS_PRECISE = 0.9, 0.4
# Multiply-adds without tensor cores, of the half-precision rate.
PRECISE = 1 / 16
# µs from a load's issue to its data, with the memory busy: what a program's steps wait for.
LATENCY = 0.7


def machine(arch: int) -> Machine:
    return MACHINES[max((known for known in MACHINES if known <= arch), default=80)]


def computing(flops: float, p: Problem, on: Machine, *, ours: bool = True) -> float:
    rate = on.flops * (PRECISE if p.precise else 2 / p.size)
    share = (OURS_PRECISE if p.precise else OURS) if ours else 1.0
    return flops / (rate * share)


def base(p: Problem, on: Machine, *, ours: bool = False) -> float:
    """The product alone, the library's or ours; without a weight, reading and writing y."""
    if not p.weight:
        return 2 * p.size * p.M * p.N / on.bandwidth
    moved = p.size * (p.M * p.K + p.K * p.N + p.M * p.N)
    return max(moved / on.bandwidth, computing(2 * p.M * p.K * p.N, p, on, ours=ours))


def shrink(p: Problem, on: Machine, step: float) -> float:
    """h, read and summed: ``step`` of K for each wait."""
    moved = p.size * (p.M * p.K + p.R * p.K + p.M * p.R)
    return max(moved / on.bandwidth, p.K / step * LATENCY)


def predicted(path: str, p: Problem, on: Machine) -> float:
    """µs of ``path``, its launches included."""
    rank = computing(2 * p.M * p.N * max(16, p.R), p, on)
    # K that three loads under way cover: 256 deep for few rows, 64 for many.
    deep = 3 * (256 if p.M <= 2048 else 64)
    if path == "one_pass":
        # Each tile of columns computes h again: beside 128 columns, or 32 for few rows.
        columns = 128 if p.M > 64 else 32
        again = 2 * p.M * p.K * rank_tile(p.R) * (p.N / columns)
        flops = (2 * p.M * p.K * p.N if p.weight else 0) + again
        # A crosses from L2 for every tile of columns; L2 gives about three times the memory's rate.
        from_l2 = p.size * p.R * p.K * -(-p.M // 128) * (p.N / columns) / (3 * on.bandwidth)
        return max(base(p, on), computing(flops, p, on), from_l2) + rank + on.launch
    if path == "library":
        written = 2 * p.size * p.M * p.N / on.bandwidth
        return shrink(p, on, deep) + written + base(p, on) + rank + 3 * on.launch
    product = base(p, on, ours=True) + rank
    if path == "overlapped":
        # The first tiles wait for h if they are done before it is; what the shrink moves, the
        # product's loads wait for: a tenth of it, by the limit of 1.008 against 1.06 without.
        waves = max(1.0, -(-p.M // 128) * -(-p.N // 256) / 132)
        beside = shrink(p, on, 2 * 32 if waves > 1 else deep)
        late = max(0.0, beside - product / waves)
        return product + late + 0.1 * shrink(p, on, p.K) + on.launch
    return shrink(p, on, deep) + product + 2 * on.launch


def predicted_multi(path: str, p: Problem, on: Machine) -> float:
    """µs of a path of many adapters, all of which have rows, each as many."""
    n = min(p.slots or 0, p.M)
    narrow = p.size * p.M * p.K + (p.lora_size or p.size) * n * p.R * p.K
    # Four waits for the memory a part of K, all parts at a time for few rows.
    waits = (4 if p.M <= 64 else p.K / 256) * LATENCY
    shrinking = max(narrow / on.bandwidth, waits)
    factors = (p.lora_size or p.size) * n * p.R * p.N
    written = 2 * p.size * p.M * p.N / on.bandwidth
    if path in ("library", "added"):
        expanding = written + max(factors / on.bandwidth, 2 * LATENCY)
        return shrinking + expanding + (base(p, on) + on.launch if p.weight else 0) + 2 * on.launch
    beside = path.endswith("_beside")
    if path.startswith("decode"):
        # Each 64 rows read the weight again, every row its b, both through L2.
        again = (-(-p.M // 64) - 1) * p.size * p.K * p.N
        from_l2 = (again + (p.lora_size or p.size) * p.M * p.R * p.N) / (3 * on.bandwidth)
        at_a_time = 16 if p.M <= 16 else 8 if p.M <= 32 else 4
        wide = max(factors / on.bandwidth + from_l2, p.R / at_a_time * LATENCY)
    else:
        # A tile's adapters follow each other, each with a wait for its b.
        a_tile = min(128, p.slots or 0, 1 + 128 * n / max(p.M, 1))
        waves = max(1.0, -(-p.M // 128) * -(-p.N // 128) / 132)
        wide = a_tile * max(1, p.R / 64) * LATENCY * waves
    product = base(p, on, ours=True)
    if path.startswith("prefill"):
        # It takes half of the SMs to draw all of the memory's bandwidth: few tiles do not.
        tiles = -(-p.M // 128) * -(-p.N // 128)
        product *= max(1.0, 66 / max(1, tiles))
    product += wide
    if not beside:
        return shrinking + product + 2 * on.launch
    # What the shrink moves, the product's loads wait for.
    return max(product + narrow / on.bandwidth, shrinking + wide) + on.launch


def best(p: Problem, arch: int, allowed: tuple[str, ...]) -> str:
    """The allowed path of the least predicted time; of equals the first."""
    predict = predicted if p.slots is None else predicted_multi
    return min(allowed, key=lambda path: predict(path, p, machine(arch)))
