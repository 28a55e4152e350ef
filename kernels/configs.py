"""Tile shapes: what each kernel can be launched with, and which of it where nothing was measured.

A config is frozen data. ``CANDIDATES`` lists all that ship: ``make aot`` compiles each of them for
every target, ``fastlora tune`` times them, ``kernels/tuning`` keeps the winners by GPU and shape.
``default`` is the choice without a measurement, each rule with its reason.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass, replace
from typing import NamedTuple


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


Config = OnePass | Shrink | Gemm | Expand | Gradient

# For 2-byte elements; ``fitted`` makes of one what a call needs.
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
        Shrink(16, 256, 4, 3),
        Shrink(32, 128, 4, 3),
        Shrink(64, 128, 4, 3),
        Shrink(64, 64, 4, 4),
    ),
    # Beside a product that takes all but 14 KiB of an SM's shared memory.
    "shrink_beside": (Shrink(16, 64, 4, 2), Shrink(64, 32, 4, 2), Shrink(64, 64, 4, 1)),
    "gemm": (
        Gemm(64, 64, 64, 8, 4, 4),
        Gemm(64, 128, 64, 8, 4, 3),
        Gemm(128, 128, 32, 8, 8, 4),
        Gemm(128, 128, 64, 8, 8, 3),
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


class Need(NamedTuple):
    """What a call asks of a config beside its shape."""

    size: int  # bytes of an element of x
    lora_size: int  # and of the adapters
    R: int
    masked: str = ""  # "x" or "y": where dropout is
    precise: bool = False  # float32 without tensor cores
    arch: int = 90


def fitted(config: Config, need: Need) -> Config:
    """The config as this call can be launched with: within registers and shared memory.

    Each rule is what ``make aot`` found to compile without a spill, on the smallest target.
    """
    inner = "BM" if isinstance(config, Gradient) else "BK"
    if need.size == 4 and hasattr(config, inner):
        config = replace(config, **{inner: max(16, getattr(config, inner) // 2)})
    if isinstance(config, Gemm):
        return _fitted_gemm(config, need)
    if isinstance(config, OnePass):
        return _fitted_one_pass(config, need)
    if isinstance(config, Shrink):
        # A mask of x holds a register an element.
        deep = 64 if need.masked and need.R > 16 and config.BM >= 64 else 512 // need.lora_size
        return replace(config, BK=min(config.BK, deep, 32 if need.precise else deep))
    if isinstance(config, Expand):
        return replace(config, BM=64, BN=64) if need.precise else config
    return replace(config, BM=16, BC=min(config.BC, 64)) if need.precise else config


def _fitted_gemm(config: Gemm, need: Need) -> Gemm:
    if need.precise:
        # Operands in registers: what 4 warps hold of 64 x 64 sums.
        return Gemm(64, 64, 16, config.GROUP, 4, max(3, config.stages))
    # Beside 128 x 256 sums there is no register for a mask, and for a float32 tile of y no shared
    # memory; and Blackwell, which holds sums elsewhere, spills as it reads them.
    room = need.arch == 90 and need.size == 2 and need.masked != "y"
    if config.BM * config.BN > 128 * 128 and not room:
        return replace(config, BM=128, BN=128, stages=4)
    return config


def _fitted_one_pass(config: OnePass, need: Need) -> OnePass:
    BM, BN, BK, warps, stages = astuple(config)
    ranks = rank_tile(need.R)
    if need.precise:
        return OnePass(min(BM, 32), min(BN, 32), 16, 4, min(stages, 3))
    if BM >= 128 and ranks * need.lora_size > 32:
        BN = 64
    # A step of x, its mask and a step of a are registers at a time.
    BK = min(BK, 128 if need.masked == "x" else BK, 512 // need.lora_size)

    def shared() -> int:
        return (stages - 1) * BK * ((BM + BN) * need.size + ranks * need.lora_size)

    # 128 KiB leave a mask and the last tiles their room within the 163 KiB of Ampere.
    while shared() > 128 * 1024 or BK * max(BM, ranks) * need.size > 16 * 1024:
        if BK > 32:
            BK //= 2
        elif stages > 2:
            stages -= 1
        else:
            break
    return OnePass(BM, BN, BK, warps, stages)


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
    # As many programs as the rows give: 16 a tile while that does not yet fill the SMs twice.
    return Shrink(16, 128, 4, 3) if M <= 4096 else Shrink(64, 64, 4, 4)


def _shrink_beside(M: int, N: int, arch: int) -> Config:
    # At most one program an SM, within 14 KiB at rank 16: the product's own must fit beside it.
    return Shrink(16, 64, 4, 2) if M <= 2048 else Shrink(64, 32, 4, 2)


def _gemm(M: int, N: int, arch: int) -> Config:
    # The tile with the most flops a byte that compiles without spills, while the tiles are enough
    # to fill 132 SMs once.
    if -(-M // 128) * -(-N // 128) >= 132:
        return Gemm(128, 128, 64, 8, 8, 3) if arch >= 90 else Gemm(128, 128, 32, 8, 8, 4)
    return Gemm(64, 64, 64, 8, 4, 4)


def _gemm_tma(M: int, N: int, arch: int) -> Config:
    if arch < 100 and -(-M // 128) * -(-N // 256) >= 132:
        return Gemm(128, 256, 64, 8, 8, 3)
    if -(-M // 128) * -(-N // 128) >= 132:
        return Gemm(128, 128, 64, 8, 8, 4)
    return Gemm(64, 128, 64, 8, 4, 4)


def _expand(M: int, N: int, arch: int) -> Config:
    # Bound by reading and writing y: any tile does whose rows are full cache lines.
    return Expand(64, 128, 4)


def _gradient(M: int, N: int, arch: int) -> Config:
    # Bound by one read of x; 64 columns are a full 128-byte line of 2-byte elements.
    return Gradient(64, 64, 4, 4)


_DEFAULTS = {
    "one_pass": _one_pass,
    "shrink": _shrink,
    "shrink_beside": _shrink_beside,
    "gemm": _gemm,
    "gemm_tma": _gemm_tma,
    "expand": _expand,
    "gradient": _gradient,
}
