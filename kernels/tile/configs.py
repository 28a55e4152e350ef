"""Tile shapes: what each kernel can be launched with, and which of it where nothing was measured.

A config is frozen data. ``CANDIDATES`` lists all that ship: ``make aot`` compiles each of them for
every target, ``fastlora tune`` times them, ``kernels/tuning`` keeps the winners by GPU and shape.
``default`` is the choice without a measurement, each rule with its reason.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class OnePass:
    """Tiles of y [BM, BN], K in steps of BK."""

    BM: int
    BN: int
    BK: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Shrink:
    """Tiles of x [BM, BK]."""

    BM: int
    BK: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Gemm:
    """Tiles of y [BM, BN], K in steps of BK, GROUP rows of tiles before the next column."""

    BM: int
    BN: int
    BK: int
    GROUP: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Decode:
    """Tiles of y [BM, BN], K in steps of BK, an adapter's ranks a row at a time."""

    BM: int
    BN: int
    BK: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Expand:
    """Tiles of y [BM, BN]."""

    BM: int
    BN: int
    warps: int
    stages: int = 2


@dataclass(frozen=True)
class Gradient:
    """Tiles of x [BM, BC], summed over M in steps of BM."""

    BM: int
    BC: int
    warps: int
    stages: int


Config = OnePass | Shrink | Gemm | Decode | Expand | Gradient

# For 2-byte elements; ``fitting`` makes of one what a call needs.
CANDIDATES: dict[str, tuple[Config, ...]] = {
    "one_pass": (
        OnePass(16, 16, 256, 4, 4),
        OnePass(16, 32, 128, 4, 5),
        OnePass(16, 32, 256, 4, 4),
        OnePass(16, 64, 128, 4, 5),
        OnePass(32, 32, 128, 4, 5),
        OnePass(64, 32, 128, 4, 4),
        OnePass(64, 64, 64, 4, 5),
        OnePass(128, 128, 32, 8, 4),
    ),
    "shrink": (
        Shrink(16, 64, 4, 3),
        Shrink(16, 128, 4, 3),
        Shrink(16, 256, 4, 4),
        Shrink(32, 128, 4, 3),
        Shrink(64, 128, 4, 3),
        Shrink(64, 64, 4, 4),
    ),
    # Beside a product whose tile leaves 18 KiB of an SM's shared memory.
    "shrink_beside": (Shrink(16, 64, 4, 2), Shrink(16, 256, 4, 4), Shrink(64, 32, 4, 3)),
    "gemm": (
        Gemm(64, 64, 32, 8, 4, 4),
        Gemm(64, 128, 32, 8, 4, 4),
        Gemm(128, 128, 32, 8, 8, 4),
    ),
    "gemm_tma": (
        Gemm(64, 128, 64, 8, 4, 4),
        Gemm(128, 128, 64, 8, 8, 4),
        Gemm(128, 256, 64, 8, 8, 3),
        Gemm(128, 256, 64, 16, 8, 3),
        Gemm(256, 128, 64, 8, 8, 3),
    ),
    "expand": (Expand(64, 64, 4), Expand(64, 128, 4), Expand(128, 128, 8)),
    "gradient": (
        Gradient(32, 64, 4, 4),
        Gradient(64, 64, 4, 4),
        Gradient(64, 128, 4, 3),
        Gradient(128, 64, 4, 3),
    ),
    # Of many adapters. The first two decide over the bits of a row's adapter part: one each.
    "multi_shrink": (Shrink(16, 128, 4, 3),),
    "multi_expand": (Expand(16, 128, 4),),
    "multi_decode": (
        Decode(16, 32, 256, 4, 4),
        Decode(16, 64, 128, 4, 4),
        Decode(32, 32, 128, 4, 4),
        Decode(64, 32, 64, 8, 5),
        Decode(64, 64, 64, 8, 4),
    ),
    "multi_gemm": (Gemm(64, 64, 32, 8, 4, 4), Gemm(128, 128, 32, 8, 8, 4)),
    "multi_gemm_tma": (Gemm(64, 128, 64, 8, 4, 4), Gemm(128, 128, 64, 8, 8, 4)),
    "multi_gradient": (Gradient(32, 64, 4, 4), Gradient(64, 64, 4, 4)),
}


def rank_block(R: int, limit: int = 64) -> int:
    """Ranks a step: a power of two from 16, whose steps pad R least; of equals the largest.

    16 is what a tensor core takes at a time, and rank 48 should cost three such steps, not four.
    """
    sizes = [size for size in (16, 32, 64, 128) if size <= limit]
    return min(sizes, key=lambda size: (-(-max(R, 1) // size) * size, -size))


def rank_tile(R: int) -> int:
    """The one tile that holds all ranks: a power of two from 16."""
    return max(16, 1 << (R - 1).bit_length()) if R else 16


def default(kernel: str, M: int, N: int, arch: int) -> Config:
    """The config where nothing was measured; M, N of the output (of ``gradient``: rows, C)."""
    return _DEFAULTS[kernel](M, N, arch)


def _one_pass(M: int, N: int, arch: int) -> Config:
    # Memory-bound: every weight byte is read once when one tile holds all rows. Narrow tiles give
    # each of about a hundred SMs one at N = 4096, and deep steps keep 4 MB of loads in flight,
    # which is bandwidth times latency there. Both by arithmetic.
    if M <= 16:
        return OnePass(16, 32, 256, 4, 4) if arch >= 90 else OnePass(16, 32, 128, 4, 5)
    if M <= 32:
        return OnePass(32, 32, 128, 4, 5)
    if M <= 64:
        return OnePass(64, 64, 64, 4, 5)
    return OnePass(128, 128, 32, 8, 4)


def _shrink(M: int, N: int, arch: int) -> Config:
    # A program's steps over K follow each other, each with the memory's latency, unless loads of
    # several are under way: few rows, deep steps.
    return Shrink(16, 256, 4, 4) if M <= 2048 else Shrink(64, 64, 4, 4)


def _shrink_beside(M: int, N: int, arch: int) -> Config:
    # At most one program an SM, slim enough to fit beside a wide tile of the product; where the
    # product's tiles are small, there is room for deep steps.
    return Shrink(64, 32, 4, 3) if wide(M, N, arch) else Shrink(16, 256, 4, 4)


def _gemm(M: int, N: int, arch: int) -> Config:
    # The larger tile has more flops a byte, if there are enough to fill 132 SMs once. From Hopper
    # on what comes here is unaligned, which takes a register an address: the larger one spills.
    enough = arch < 90 and -(-M // 128) * -(-N // 128) >= 132
    return Gemm(128, 128, 32, 8, 8, 4) if enough else Gemm(64, 64, 32, 8, 4, 4)


def _gemm_tma(M: int, N: int, arch: int) -> Config:
    # The tile with the most flops a byte that compiles without spills, while there are enough
    # tiles to fill 132 SMs once.
    if wide(M, N, arch):
        return Gemm(128, 256, 64, 8, 8, 3)
    if -(-M // 128) * -(-N // 128) >= 132:
        return Gemm(128, 128, 64, 8, 8, 4)
    return Gemm(64, 128, 64, 8, 4, 4)


def wide(M: int, N: int, arch: int) -> bool:
    """Whether a product of this shape takes tiles that fill an SM."""
    return 90 <= arch < 100 and -(-M // 128) * -(-N // 256) >= 132


def _expand(M: int, N: int, arch: int) -> Config:
    # Bound by reading and writing y: any tile does whose rows are full cache lines.
    return Expand(64, 128, 4)


def _gradient(M: int, N: int, arch: int) -> Config:
    # Bound by one read of x; 64 columns are a full 128-byte line of 2-byte elements.
    return Gradient(64, 64, 4, 4)


def _multi_shrink(M: int, N: int, arch: int) -> Config:
    # 16 rows are what a tensor core takes, and of many adapters more are seldom found together. At
    # 64 ranks 60 KiB, which leaves room for a tile of the product beside it.
    return Shrink(16, 128, 4, 3)


def _multi_expand(M: int, N: int, arch: int) -> Config:
    return Expand(16, 128, 4)


def _multi_decode(M: int, N: int, arch: int) -> Config:
    # As ``one_pass``, whose stream of the weight this is; each row takes registers for its own b.
    if M <= 16:
        return Decode(16, 32, 256, 4, 4) if arch >= 90 else Decode(16, 64, 128, 4, 4)
    return Decode(32, 32, 128, 4, 4) if M <= 32 else Decode(64, 32, 64, 8, 5)


def _multi_gemm(M: int, N: int, arch: int) -> Config:
    return _gemm(M, N, arch)


def _multi_gemm_tma(M: int, N: int, arch: int) -> Config:
    # Not the widest tile: beside its sums there is no register for choosing among rows. Blackwell
    # has none beside 128 x 128 either.
    if arch < 100 and -(-M // 128) * -(-N // 128) >= 132:
        return Gemm(128, 128, 64, 8, 8, 4)
    return Gemm(64, 128, 64, 8, 4, 4)


def _multi_gradient(M: int, N: int, arch: int) -> Config:
    # An adapter's rows may be few: steps of 32 waste less.
    return Gradient(32, 64, 4, 4)


_DEFAULTS = {
    "one_pass": _one_pass,
    "shrink": _shrink,
    "shrink_beside": _shrink_beside,
    "gemm": _gemm,
    "gemm_tma": _gemm_tma,
    "expand": _expand,
    "gradient": _gradient,
    "multi_shrink": _multi_shrink,
    "multi_expand": _multi_expand,
    "multi_decode": _multi_decode,
    "multi_gemm": _multi_gemm,
    "multi_gemm_tma": _multi_gemm_tma,
    "multi_gradient": _multi_gradient,
}
