"""Settings of the demo: its sizes and rates, and what all chapters share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastlora.demo.training import Recipe

if TYPE_CHECKING:
    # Benchmarks run where rich is not installed.
    from fastlora.demo.claims import Claims
    from fastlora.demo.screen import Screen


@dataclass(frozen=True)
class Size:
    """Sizes. hidden, layers: of the small Llama. length: tokens a row. held_out: rows."""

    hidden: int
    layers: int
    pretraining_chars: int
    pretraining_steps: int
    domain_chars: int
    steps: int
    batch_size: int
    length: int
    held_out: int
    timing_rounds: int
    new_tokens: int


FULL = Size(192, 4, 1_000_000, 600, 200_000, 100, 8, 128, 64, 12, 64)
QUICK = Size(64, 2, 40_000, 12, 20_000, 6, 4, 64, 8, 2, 8)


@dataclass(frozen=True)
class Rates:
    """Learning rate of each way to fine-tune."""

    full: float
    last_block: float
    last_layer: float
    lora: float


# For a small model, briefly trained: each the best of a sweep by factors of two.
SMALL_MODEL = Rates(full=3e-3, last_block=1.2e-2, last_layer=8e-2, lora=1e-2)
# For a model that was trained for weeks, and has more to lose: customary rates.
LARGE_MODEL = Rates(full=5e-5, last_block=2e-4, last_layer=5e-4, lora=5e-4)


@dataclass(frozen=True)
class Domain:
    """Tokens in rows (n, length): some to learn from, some that training never sees."""

    train: Tensor
    held_out: Tensor


@dataclass(frozen=True)
class Stage:
    """Shared state of the chapters: base model, domains, recipe, and where results go.

    quality: whether claims about how well a method learns count; those about exactness always do.
    """

    base: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    domains: dict[str, Domain]
    rates: Rates
    recipe: Recipe
    size: Size
    directory: Path
    screen: Screen
    claims: Claims
    quality: bool

    def adapter_folder(self, domain: str) -> Path:
        """Returns the folder of ``domain``'s adapter."""
        return self.directory / domain
