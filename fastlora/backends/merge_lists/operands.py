"""Adapters and receipts of several weights: flat, as the ops take them, and by weight.

Adapters are flat lists with ``counts`` of them a weight. A receipt is four tensors (positions,
bits, counts, checksums), flat again where an op takes them. Where it returns them, those of all
weights are one after another in four, with a fifth (weights, 3) that says how many elements, tiles
and checksums each weight has.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import torch
from torch import Tensor

PARTS = 4  # of a receipt
# Every lora_A, every lora_B, every scaling of a weight.
Factors = tuple[list[Tensor], list[Tensor], list[float]]
Receipts = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def split_adapters(
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    scalings: Sequence[float],
    counts: Sequence[int],
) -> list[Factors]:
    """The factors of each weight."""
    A, B, factors = iter(lora_A), iter(lora_B), iter(scalings)
    return [(list(islice(A, n)), list(islice(B, n)), list(islice(factors, n))) for n in counts]


def parts_of(receipts: Sequence[Tensor], index: int) -> Sequence[Tensor]:
    """The four parts of one weight's receipt among those that an op takes."""
    return receipts[PARTS * index : PARTS * (index + 1)]


def split_receipts(receipts: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
    """Each weight's receipt, four views, from what an op returns."""
    *parts, sizes = receipts
    elements, tiles, sums = (column.tolist() for column in sizes.unbind(1))
    shares = (elements, elements, tiles, sums)
    return list(zip(*(t.split(n) for t, n in zip(parts, shares, strict=True)), strict=True))


def join_receipts(receipts: Sequence[Sequence[Tensor]]) -> Receipts:
    """What an op returns from each weight's receipt."""
    flat = [[t.reshape(-1) for t in parts] for parts in receipts]
    sizes = [[parts[i].numel() for i in (0, 2, 3)] for parts in flat]
    positions, bits, counts, sums = (
        some[0] if len(some) == 1 else torch.cat(some) for some in zip(*flat, strict=True)
    )
    return positions, bits, counts, sums, torch.tensor(sizes, dtype=torch.int64, device="cpu")


def flatten_receipts(receipts: Sequence[Tensor]) -> list[Tensor]:
    """What an op takes from what another one has returned."""
    return [part for parts in split_receipts(receipts) for part in parts]
