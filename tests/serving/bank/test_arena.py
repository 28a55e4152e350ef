"""The arena gives out blocks of one buffer that never overlap, and joins free ones."""

from __future__ import annotations

import random

import pytest
import torch

from fastlora.serving.bank.arena import GRANULE, Arena, count_granules, join_neighbours


def arena(size: int) -> Arena:
    return Arena(size, torch.float32, torch.device("cpu"))


def test_count_granules_rounds_up_to_whole_granules():
    assert [count_granules(n) for n in (0, 1, GRANULE, GRANULE + 1)] == [0, 1, 1, 2]


def test_arena_places_blocks_side_by_side_where_possible():
    of = arena(20)
    first, second, third = (of.take([2, 3]) for _ in range(3))
    assert (first, second, third) == ([(0, 2), (2, 3)], [(5, 2), (7, 3)], [(10, 2), (12, 3)])
    of.give_back(second)
    of.give_back(third)
    assert of.free == 15
    # The smallest run that holds all; what it leaves is in one piece with what follows.
    assert of.take([15]) == [(5, 15)]
    assert of.free == 0


def test_arena_spreads_blocks_when_runs_are_short():
    of = arena(12)
    taken = [of.take([2]) for _ in range(6)]
    for i in (0, 2, 3):
        of.give_back(taken[i])
    assert of.take([2, 2, 3]) is None
    assert of.free == 6
    blocks = of.take([2, 2, 2])
    assert sorted(blocks) == [(0, 2), (4, 2), (6, 2)]
    assert of.free == 0


def test_arena_of_size_zero_takes_nothing():
    of = arena(0)
    assert of.take([]) == []
    assert of.take([1]) is None
    of.give_back([])
    assert (of.free, of.size) == (0, 0)


def test_arena_refuses_more_granules_than_tables_address():
    with pytest.raises(ValueError, match="device_bytes: expected less than"):
        arena(2**31)


def test_join_neighbours_merges_adjacent_blocks():
    blocks = [(0, 2), (2, 1), (5, 1), (6, 4), (3, 1)]
    assert list(join_neighbours(blocks)) == [(0, 3), (5, 5), (3, 1)]
    assert list(join_neighbours([])) == []


@pytest.mark.parametrize("seed", range(3))
def test_arena_random_blocks_never_overlap(seed):
    """Each holds a number of its own until it is cleared; what is free is zero."""
    draw, of, held = random.Random(seed), arena(97), {}
    for step in range(1, 800):
        if held and draw.random() < 0.5:
            number = draw.choice(list(held))
            blocks = held.pop(number)
            for first, size in blocks:
                assert bool((of.part(first, size) == number).all())
            of.clear(blocks)
            of.give_back(blocks)
        else:
            sizes = [draw.randint(1, 9) for _ in range(draw.randint(1, 4))]
            blocks = of.take(sizes)
            if blocks is None:
                assert max(sizes) > 1 or of.free < len(sizes)
                continue
            assert [size for _, size in blocks] == sizes
            of.fill(blocks, torch.full((sum(sizes) * GRANULE,), float(step)))
            held[step] = blocks
        taken = sum(size for blocks in held.values() for _, size in blocks)
        assert of.free == 97 - taken
        assert int((of.buffer != 0).sum()) == taken * GRANULE
    for blocks in held.values():
        of.clear(blocks)
        of.give_back(blocks)
    assert of.take([97]) == [(0, 97)]
