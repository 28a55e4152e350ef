"""What fits: a config cut down to the registers and the shared memory that a call leaves it.

Configs are written for 2-byte elements, 16 ranks, no mask and the largest GPUs. ``fitted`` makes of
one what this dtype, these ranks, this mask and this GPU can launch; it is applied to every config,
tuned ones too.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from fastlora.kernels.tile.configs import (
    Config,
    Decode,
    Expand,
    Gemm,
    Gradient,
    OnePass,
    Shrink,
    rank_tile,
)

# Bytes of shared memory that one block may ask for, by compute capability; an unknown one is taken
# to have the least, as consumer GPUs do.
SHARED = {
    80: 163 * 1024,
    87: 163 * 1024,
    90: 227 * 1024,
    100: 227 * 1024,
    103: 227 * 1024,
}
LEAST_SHARED = 99 * 1024
# What is left of Hopper's beside a product with tiles of 128 x 256, which take 213,016 bytes, and
# the 1 KiB that is reserved for each of the two blocks.
SLIM = 18_000


class Need(NamedTuple):
    """What a call asks of a config beside its shape."""

    size: int  # bytes of an element of x
    lora_size: int  # and of the adapters
    R: int
    masked: str = ""  # "x" or "y": where dropout is
    precise: bool = False  # float32 without tensor cores
    arch: int = 90
    slim: bool = False  # runs beside a product that leaves little

    @property
    def shared(self) -> int:
        return SHARED.get(self.arch, LEAST_SHARED)


def shared(config: Config, need: Need) -> int:
    """Bytes of shared memory that a config takes, from above: its stages, a mask, a tile of y."""
    ranks = min(rank_tile(need.R), 64)
    stages = max(1, getattr(config, "stages", 1))
    if isinstance(config, OnePass):
        step = (config.BM + config.BN) * need.size + rank_tile(need.R) * need.lora_size
        return stages * config.BK * step
    if isinstance(config, Shrink):
        return stages * config.BK * (config.BM * need.size + ranks * need.lora_size)
    if isinstance(config, Decode):
        return stages * config.BK * (config.BM + config.BN) * need.size
    if isinstance(config, Gemm):
        tile = config.BM * config.BN * need.size
        return (stages * (config.BM + config.BN) * config.BK) * need.size + tile
    if isinstance(config, Gradient):
        return stages * config.BM * (config.BC + ranks) * need.size
    return config.BM * config.BN * 4


def fitted(config: Config, need: Need) -> Config:
    """The config as this call can be launched with: within registers and shared memory.

    The rules are what ``make aot`` found to compile without a spill, on the smallest target.
    """
    inner = "BM" if isinstance(config, Gradient) else "BK"
    if need.size == 4 and hasattr(config, inner):
        config = replace(config, **{inner: max(16, getattr(config, inner) // 2)})
    config = _FITTED[type(config)](config, need)
    while shared(config, need) > need.shared and config.stages > 2:
        config = replace(config, stages=config.stages - 1)
    while shared(config, need) > need.shared and getattr(config, inner, 16) > 16:
        config = replace(config, **{inner: getattr(config, inner) // 2})
    return config


def _fitted_one_pass(config: OnePass, need: Need) -> OnePass:
    ranks = rank_tile(need.R)
    if need.precise:
        # Products without tensor cores hold their operands in registers.
        BM, BN, stages = min(config.BM, 32), min(config.BN, 32), min(config.stages, 3)
        return OnePass(BM, BN, 16, 4, stages)
    if config.BM >= 128 and ranks * need.lora_size > 32:
        config = replace(config, BN=64)
    # A step of x, its mask and a step of a are registers at a time.
    deep = min(config.BK, 128 if need.masked == "x" else config.BK, 512 // need.lora_size)
    while deep > 32 and deep * max(config.BM, ranks) * need.size > 16 * 1024:
        deep //= 2
    return replace(config, BK=deep)


def _fitted_shrink(config: Shrink, need: Need) -> Shrink:
    # A mask of x holds a register an element.
    deep = 64 if need.masked and need.R > 16 and config.BM >= 64 else 512 // need.lora_size
    config = replace(config, BK=min(config.BK, deep, 32 if need.precise else deep))
    while need.slim and shared(config, need) > SLIM and config.stages > 2:
        config = replace(config, stages=config.stages - 1)
    while need.slim and shared(config, need) > SLIM and config.BK > 16:
        config = replace(config, BK=config.BK // 2)
    return config


def _fitted_decode(config: Decode, need: Need) -> Decode:
    if need.precise:
        return Decode(min(config.BM, 32), 32, 16, 4, min(config.stages, 3))
    return config


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


def _fitted_expand(config: Expand, need: Need) -> Expand:
    return replace(config, BM=min(config.BM, 64), BN=64) if need.precise else config


def _fitted_gradient(config: Gradient, need: Need) -> Gradient:
    return replace(config, BM=16, BC=min(config.BC, 64)) if need.precise else config


_FITTED = {
    OnePass: _fitted_one_pass,
    Shrink: _fitted_shrink,
    Gemm: _fitted_gemm,
    Decode: _fitted_decode,
    Expand: _fitted_expand,
    Gradient: _fitted_gradient,
}
