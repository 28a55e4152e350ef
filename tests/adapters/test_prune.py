"""TIES, DARE and magnitude pruning, seen on a few numbers."""

from __future__ import annotations

import weakref

import pytest
import torch

from fastlora.adapters.combine import combine
from fastlora.adapters.prune import (
    METHODS,
    Method,
    average_elected,
    prune_at_random,
    prune_by_magnitude,
    sum_pruned,
)
from tests.support.combined import random_adapters
from tests.support.helpers import same_bits, unchanged

GRID = torch.tensor([[1.0, -4.0, 0.5], [3.0, -2.0, 0.0]])


@pytest.mark.parametrize(
    "density, kept",
    [
        (0.0, [[0, 0, 0], [0, 0, 0]]),
        (0.17, [[0, -4, 0], [0, 0, 0]]),
        (0.3, [[0, -4, 0], [0, 0, 0]]),
        (0.5, [[0, -4, 0], [3, -2, 0]]),
        (0.99, [[1, -4, 0.5], [3, -2, 0]]),
    ],
)
def test_prune_by_magnitude_keeps_largest_entries(density, kept):
    with unchanged(GRID):
        assert torch.equal(
            prune_by_magnitude(GRID, density), torch.tensor(kept, dtype=torch.float32)
        )


def test_prune_at_random_keeps_the_expectation():
    t = torch.full((100, 100), 2.0)
    got = prune_at_random(t, 0.25)
    assert set(got.unique().tolist()) == {0.0, 8.0}
    assert got.mean().item() == pytest.approx(2.0, abs=0.2)


def test_seed_fixes_entries_kept_by_dare():
    seeds = []
    adapters = random_adapters(2, 2)
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        seeds.append(combine(adapters, [1.0, 1.0], "dare_linear", density=0.5)[0])
    assert same_bits(seeds[0], seeds[1])
    assert not torch.equal(seeds[0], seeds[2])


@pytest.mark.parametrize("vote, elected", [("total", -3.0), ("frequency", 1.0)])
def test_average_elected_follows_the_voting_method(vote, elected):
    """Of -3, 1, 1 the sum is negative and most are positive; the mean is over those that agree."""
    tensors = [torch.tensor([value]) for value in (-3.0, 1.0, 1.0)]
    assert average_elected(tensors, [1.0, 1.0, 1.0], vote).item() == elected


def test_average_elected_ignores_weights_in_vote():
    tensors = [torch.tensor([-3.0, 2.0, 0.0]), torch.tensor([1.0, -2.0, 0.0])]
    got = average_elected(tensors, [0.5, 100.0], "total")
    assert torch.equal(got, torch.tensor([-1.5, 1.0, 0.0]))


def test_density_one_prunes_nothing():
    tensors, weights = [torch.randn(3, 4) for _ in range(2)], [0.7, -0.4]
    want = sum_pruned(METHODS["linear"], tensors, weights, 1.0, "total")
    for name in ("magnitude_prune", "dare_linear"):
        state = torch.get_rng_state()
        assert same_bits(sum_pruned(METHODS[name], tensors, weights, 1.0, "total"), want)
        assert torch.equal(state, torch.get_rng_state())


def test_plain_sum_holds_one_pruned_tensor():
    pruned: list[weakref.ref] = []
    alive = []

    def prune(t: torch.Tensor, density: float) -> torch.Tensor:
        alive.append(sum(ref() is not None for ref in pruned))
        kept = t * density
        pruned.append(weakref.ref(kept))
        return kept

    tensors = (torch.ones(3) for _ in range(5))
    got = sum_pruned(Method(prune, elects=False), tensors, [1.0] * 5, 0.5, "total")
    assert torch.equal(got, torch.full((3,), 2.5))
    assert max(alive) == 1


@pytest.mark.parametrize("name", METHODS)
def test_sum_pruned_leaves_its_tensors_unchanged(name):
    tensors = [torch.randn(3, 4) for _ in range(3)]
    with unchanged(tensors):
        sum_pruned(METHODS[name], tensors, [1.0, 0.0, -1.0], 0.5, "total").fill_(9)
