"""Sums of tensors that get less into each other's way: TIES, DARE and magnitude pruning.

Every function takes tensors of one shape and dtype, one an adapter, and never changes them. They
work on lora_A and lora_B apart, or on the dense deltas of one layer: ``combining.py`` decides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import reduce
from operator import add
from typing import NamedTuple

import torch
from torch import Tensor

MAJORITIES = ("total", "frequency")

Prune = Callable[[Tensor, float], Tensor]


class Method(NamedTuple):
    """How tensors are pruned, if at all, and whether their signs are put to the vote (TIES)."""

    prune: Prune | None
    elects: bool


def prune_by_magnitude(t: Tensor, density: float) -> Tensor:
    """Keeps the ``int(density * t.numel())`` entries of largest magnitude, zeros elsewhere.

    Which of several equal ones stay is ``topk``'s choice. Reference: Han et al. 2015; step one of
    TIES.
    """
    flat = t.flatten()
    places = flat.abs().topk(int(density * t.numel()), sorted=False).indices
    pruned = torch.zeros_like(flat)
    pruned[places] = flat[places]
    return pruned.view(t.shape)


def prune_at_random(t: Tensor, density: float) -> Tensor:
    """Keeps each entry with probability ``density``, divided by it; zeros elsewhere.

    Draws ``t.numel()`` numbers from torch's generator of t's device. Reference: DARE, Yu et al.
    2023.
    """
    return t * torch.bernoulli(torch.full_like(t, density)) / density


METHODS = {
    "linear": Method(None, elects=False),
    "magnitude_prune": Method(prune_by_magnitude, elects=False),
    "ties": Method(prune_by_magnitude, elects=True),
    "dare_linear": Method(prune_at_random, elects=False),
    "dare_ties": Method(prune_at_random, elects=True),
}


def sum_pruned(
    method: Method, tensors: Iterable[Tensor], weights: Sequence[float], density: float, vote: str
) -> Tensor:
    """Prunes the tensors and sums them; ``vote``, one of MAJORITIES, is read where signs elect.

    ``tensors`` may be a generator: those of a plain sum are alive one at a time.
    """
    prune = method.prune
    if prune is not None and density < 1:
        tensors = (prune(t, density) for t in tensors)
    if method.elects:
        return average_elected(list(tensors), weights, vote)
    return sum_weighted(tensors, weights)


def sum_weighted(tensors: Iterable[Tensor], weights: Sequence[float]) -> Tensor:
    """Sums tensors times weights: task arithmetic, Ilharco et al. 2022."""
    # One after the other, as torch sums a stack of few, without the stack.
    return reduce(add, (t * weight for t, weight in zip(tensors, weights, strict=True)))


def average_elected(tensors: Sequence[Tensor], weights: Sequence[float], vote: str) -> Tensor:
    """Averages, per entry, the weighted numbers that have the elected sign.

    The sign is that of the tensors' sum (``vote="total"``) or of most of them ("frequency"), plus
    where they balance. Weights have no vote. Reference: TIES, Yadav et al. 2023.
    """
    ballots = tensors if vote == "total" else (t.sign() for t in tensors)
    elected = torch.where(reduce(add, ballots) >= 0, 1.0, -1.0)
    total, count = torch.zeros_like(tensors[0]), torch.zeros_like(tensors[0])
    for t, weight in zip(tensors, weights, strict=True):
        agrees = t.sign() == elected
        total += t * weight * agrees
        count += agrees
    return total / count.clamp(min=1)
