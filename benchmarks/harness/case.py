"""Cases, and the interface of a kind of work that can be measured."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

# Providers of every work: the base of ratios, and the yardstick of errors.
BASE, YARDSTICK = "base", "torch"

Operands = dict[str, Tensor]
Outputs = dict[str, Tensor]
Call = Callable[[], Outputs]
Builder = Callable[["Case", Operands], Call]

_TINY = {"M": 9, "T": 12, "B": 3, "L": 5, "K": 40, "N": 56, "R": 4, "S": 5}
_TINY |= {"H": 64, "I": 96, "layers": 2, "new": 3}


class Ceilings(NamedTuple):
    """Rates that the device reached in this run: bytes a second, and flops a second by dtype."""

    bandwidth: float
    flops: dict[str, float]


class Absent(Exception):
    """Reason why a provider cannot be had, raised by its builder."""


class Work(ABC):
    """One kind of work: operands, providers, expected outputs and least cost.

    ``providers``: a builder takes a case and its own operands, prepares whatever is prepared once a
    step or less, and returns the call that is timed.
    """

    suite: str
    name: str
    providers: dict[str, Builder]
    # Providers on a GPU alone, and providers whose compilation takes longer than a case.
    gpu_providers: Mapping[str, Builder] = {}
    compiled_providers: Mapping[str, Builder] = {}
    # Calls in one sample, whose time is divided by them. Where the host alone is timed, a GPU is
    # not waited for.
    calls = 1
    host_only = False
    # Whether a call waits for the device inside, as generating does: a GPU's events would then miss
    # part of it, and the wall clock is used.
    waits = False
    # The op whose backend a line names.
    op = "lora_linear"
    # Factor on one layer's limit (gate.py): how far unfused torch itself may be from float64.
    yardstick_factor = 1.0

    @abstractmethod
    def operands(self, case: Case, seed: int) -> Operands:
        """Draws the operands in new tensors on the case's device; same seed, same values."""

    @abstractmethod
    def expected(self, case: Case, operands: Operands, provider: str) -> Outputs:
        """Computes the sampled part of the outputs in float64; without adapters for the base."""

    @abstractmethod
    def sample(self, case: Case, outputs: Outputs) -> Outputs:
        """Selects the part of a call's outputs that ``expected`` computes."""

    @abstractmethod
    def cost(self, case: Case, provider: str) -> tuple[int, int]:
        """Returns floating-point operations and bytes, each operand moved once."""

    def truth(self, case: Case, provider: str) -> str:
        """Returns a key: providers of one key have the same ``expected`` outputs."""
        return BASE if provider == BASE else "adapters"

    def gated(self, case: Case) -> Case:
        """Returns the case that the gate compares before this is timed: itself if it can be."""
        return case

    def least(self, case: Case, provider: str, ceilings: Ceilings) -> float:
        """Returns the seconds that memory and arithmetic need at this device's ceilings."""
        flops, moved = self.cost(case, provider)
        return max(moved / ceilings.bandwidth, flops / ceilings.flops[case.dtype])


@dataclass(frozen=True)
class Case:
    """One row of the list: a work at one shape, dtype and device."""

    work: Work
    device: str
    dtype: str
    shape: Mapping[str, int]
    lora_dtype: str = ""  # "": the same as dtype
    dropout: float = 0.0
    workload: str = ""
    ranks: str = ""  # "mixed": slots of 8 to R ranks
    quick: bool = False
    full: bool = False  # measured with --full alone
    compiled: bool = False  # whether compiled providers take part

    @property
    def providers(self) -> dict[str, Builder]:
        gpu = self.work.gpu_providers if self.device == "cuda" else {}
        compiled = self.work.compiled_providers if self.compiled else {}
        return {**self.work.providers, **compiled, **gpu}

    @property
    def suite(self) -> str:
        return self.work.suite

    @property
    def name(self) -> str:
        parts = [self.work.name, self.dtype, *(f"{k}{v}" for k, v in self.shape.items())]
        parts += [self.workload] if self.workload else []
        parts += [f"ranks_{self.ranks}"] if self.ranks else []
        parts += [f"lora_{self.lora_dtype}"] if self.lora_dtype else []
        parts += [f"dropout{self.dropout}"] if self.dropout else []
        return "-".join(parts)

    @property
    def element_sizes(self) -> tuple[int, int]:
        """Bytes of an element of the base and of the adapters."""
        return DTYPES[self.dtype].itemsize, DTYPES[self.lora_dtype or self.dtype].itemsize

    def tiny(self) -> Case:
        """Returns the case at a tiny shape, for tests, without compiled providers."""
        shape = {k: min(v, _TINY[k]) for k, v in self.shape.items()}
        return replace(self, shape=shape, compiled=False)

    def tensor(self, draw: torch.Generator, *shape: int, scale: float = 1.0) -> Tensor:
        """Draws a normal tensor in the base's dtype on the case's device."""
        values = torch.randn(shape, generator=draw).mul_(scale)
        return values.to(self.device, DTYPES[self.dtype])

    def adapter(self, draw: torch.Generator, *shape: int, scale: float = 1.0) -> Tensor:
        """Draws a tensor in the adapters' dtype, with values that the base's dtype can hold."""
        return self.tensor(draw, *shape, scale=scale).to(DTYPES[self.lora_dtype or self.dtype])


def copy_operands(operands: Operands) -> Operands:
    """Copies operands for one call, with the same values and requires_grad."""
    return {k: t.detach().clone().requires_grad_(t.requires_grad) for k, t in operands.items()}


def spread_indices(size: int, count: int = 7) -> Tensor:
    """Returns indices spread over ``range(size)``, both ends among them."""
    return torch.linspace(0, size - 1, min(size, count)).round().long().unique()


def widen(t: Tensor) -> Tensor:
    """Converts for the oracle: float64 on the host, once instead of once a token."""
    return t.detach().to("cpu", torch.float64)
