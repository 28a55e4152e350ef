"""What a path costs by arithmetic, in µs: what decides where nothing was measured.

Each path is bytes over bandwidth or flops over throughput, whichever is more, and its launches. The
machines are about three quarters of their data sheets: only ratios of paths are read from them.
"""

from __future__ import annotations

from typing import NamedTuple

from fastlora.kernels.configs import rank_tile

PATHS = ("one_pass", "two_pass", "overlapped", "library")


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


def machine(arch: int) -> Machine:
    return MACHINES[max((known for known in MACHINES if known <= arch), default=80)]


def base(p: Problem, on: Machine) -> float:
    """The product alone: the limit of every path."""
    moved = p.size * (p.M * p.K + p.K * p.N + p.M * p.N)
    return max(moved / on.bandwidth, 2 * p.M * p.K * p.N * p.size / 2 / on.flops)


def shrink(p: Problem, on: Machine) -> float:
    return p.size * (p.M * p.K + p.R * p.K + p.M * p.R) / on.bandwidth


def predicted(path: str, p: Problem, on: Machine) -> float:
    """µs of ``path``, its launches included. Without a weight the product is the reading of y."""
    written = p.size * p.M * p.N / on.bandwidth
    rank = 2 * p.M * (p.N * max(16, p.R)) * p.size / 2 / on.flops
    product = base(p, on) if p.weight else 2 * written
    if path == "one_pass":
        # Each tile of columns computes h again: beside 128 columns, or 64 and fewer for few rows.
        columns = 128 if p.M > 64 else 32
        again = 2 * p.M * p.K * rank_tile(p.R) * (p.N / columns) * p.size / 2 / on.flops
        flops = (2 * p.M * p.K * p.N * p.size / 2 / on.flops if p.weight else 0) + again + rank
        # A crosses from L2 for every tile of columns; L2 gives about three times the memory's rate.
        rows = -(-p.M // 128)
        from_l2 = p.size * p.R * p.K * rows * (p.N / columns) / (3 * on.bandwidth)
        return max(product, flops, from_l2) + on.launch
    if path == "library":
        return shrink(p, on) + 2 * written + product + rank + 3 * on.launch
    if path == "overlapped":
        # What a tile of the product takes cannot be hidden behind: a tenth, by the limit of 1.008
        # against the 1.06 of no overlap, is left of the shrink.
        return product + rank + 0.1 * shrink(p, on) + on.launch
    return shrink(p, on) + product + rank + 2 * on.launch


def best(p: Problem, arch: int, allowed: tuple[str, ...]) -> str:
    """The allowed path of the least predicted time; of equals the first."""
    return min(allowed, key=lambda path: predicted(path, p, machine(arch)))
