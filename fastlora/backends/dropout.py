"""The dropout mask of the LoRA branch: a pure function of (seed, row, column).

Nothing is stored: forward and backward regenerate it, in whatever tiles they work, on any
backend. Philox4x32 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) with key
= the 64-bit seed and counter = (column // 8, row, 0, 0) gives 128 bits: eight 16-bit lanes, lane i
for column ``8 * (column // 8) + i``, low half of a word first. An element is dropped when its lane
is below ``threshold(p)``. ``kernels/tile/philox.py`` is the Triton twin.
"""

from __future__ import annotations

import torch
from torch import Tensor

LANES = 8
# Seven rounds are the fewest that pass BigCrush in the paper (its library uses ten for margin).
ROUNDS = 7
_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def threshold(p: float) -> int:
    """Lanes (16 bits) below this are dropped: p in steps of 2**-16."""
    return round(p * 65536)


def keep_scale(p: float) -> float:
    """What kept elements are multiplied by: 1 / (1 - p) for the p that the lanes can express."""
    kept = 65536 - threshold(p)
    return 65536 / kept if kept else 0.0


def new_seed(device: torch.device) -> Tensor:
    """A 0-d int64 seed from torch's generator of ``device``: checkpointing and graphs replay it."""
    return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=device)


def dropped(x: Tensor, p: float, seed: Tensor, first_row: int = 0) -> Tensor:
    """``dropout(x)`` for rows ``first_row …`` of a matrix: x (M, K) to a new (M, K)."""
    # The scale as a number, never rounded to x's dtype by itself: that would bias every element.
    return x.mul(keep_mask(x.shape[0], x.shape[1], p, seed, first_row)).mul_(keep_scale(p))


def keep_mask(rows: int, columns: int, p: float, seed: Tensor, first_row: int = 0) -> Tensor:
    """The mask of ``rows`` rows from first_row on: bool (rows, columns)."""
    groups = -(-columns // LANES)
    c0 = torch.arange(groups, dtype=torch.int64, device=seed.device)
    c1 = torch.arange(first_row, first_row + rows, dtype=torch.int64, device=seed.device)
    words = torch.broadcast_tensors(*_philox(c0, c1[:, None], seed))
    # Two lanes a word in memory, the low one first: torch runs on little-endian machines alone.
    lanes = torch.stack(words, -1).to(torch.int32).view(torch.int16).view(rows, groups * LANES)
    # As signed numbers in the same order: torch compares no unsigned ones; a lane reaches 65535.
    signed = lanes[:, :columns].bitwise_xor(-0x8000)
    return signed > 0x7FFF if threshold(p) > 0xFFFF else signed >= threshold(p) - 0x8000


def _philox(c0: Tensor, c1: Tensor, seed: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four 32-bit words a counter, held in int64; products wrap modulo 2**64 as C's do."""
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    c2 = c3 = torch.zeros_like(seed)
    for _ in range(ROUNDS):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1 = ((p1 >> 32) & _WORD) ^ c1 ^ k0, p1 & _WORD
        c2, c3 = ((p0 >> 32) & _WORD) ^ c3 ^ k1, p0 & _WORD
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3
