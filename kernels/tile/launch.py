"""What launchers share: dropout as numbers, flags of what is absent, the device and its facts."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from fastlora.kernels.tile.configs import Config
from fastlora.kernels.tile.gpu import arch_of as arch_of
from fastlora.kernels.tile.gpu import device_of as device_of
from fastlora.kernels.tile.gpu import programs_of as programs_of
from fastlora.kernels.tile.numerics import INTERPRETED


class Dropout(NamedTuple):
    """Which elements of the LoRA branch's input survive; ``philox.keep_tile`` says which."""

    seed: Tensor  # 0-d int64
    threshold: int
    keep_scale: float

    @classmethod
    def of(cls, p: float, seed: Tensor | None) -> Dropout | None:
        """None without a seed; p in steps of 2**-16, as ``fastlora/backends/dropout.py`` has it."""
        if seed is None:
            return None
        threshold = round(p * 65536)
        return cls(seed, threshold, 65536 / (65536 - threshold) if threshold < 65536 else 0.0)


def dropout_arguments(drop: Dropout | None, otherwise: Tensor) -> tuple[Tensor, int, float]:
    """(seed, threshold, keep_scale); without dropout a pointer that is never read, and 1."""
    return drop if drop is not None else (otherwise, 0, 1.0)


def compiled_as(config: Config) -> dict[str, Any]:
    """The compiler's options for a config."""
    # Contraction is asked for, since triton's own default is about to change.
    return {
        "num_warps": config.warps,
        "num_stages": config.stages,
        "enable_fp_fusion": True,
    }


def rows_of_ones(h: Tensor) -> bool:
    """Whether h's columns lie side by side, as the kernels read and write them."""
    return h.stride(1) == 1 or h.shape[1] <= 1


def by_columns(t: Tensor) -> Tensor:
    """t for a product of the library's; off a GPU, where kernels are interpreted, column by column.

    Of rows a CPU with AMX takes in what lies behind them: see
    ``fastlora/backends/torch/products.py``.
    """
    return t if t.is_cuda else t.T.contiguous().T


def interpreted() -> bool:
    return bool(INTERPRETED.value)
