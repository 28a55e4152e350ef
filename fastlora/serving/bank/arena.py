"""One buffer for the pages of many adapters: blocks of it are taken and given back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

# Blocks begin at multiples of so many elements: of two bytes each, a line of a GPU's cache.
GRANULE = 64

# Where a block lies: its first granule and their number.
Block = tuple[int, int]


def count_granules(elements: int) -> int:
    """Returns how many granules hold so many elements."""
    return -(-elements // GRANULE)


class Arena:
    """``size`` granules of zeros. One thread at a time may take and give back.

    What is free is zero: blocks are cleared with ``clear`` before they are given back.
    """

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device) -> None:
        if size >= 2**31:
            raise ValueError(
                f"device_bytes: expected less than {2**31 * GRANULE} numbers of {dtype}, which "
                f"tables of 32 bits can name, got {size * GRANULE}"
            )
        with torch.inference_mode(False):
            self.buffer = torch.zeros(size * GRANULE, dtype=dtype, device=device)
        self.size = size
        # Sorted, none of them touching the next: [first, end).
        self._runs = [(0, size)] if size else []

    @property
    def free(self) -> int:
        """Granules that are not taken."""
        return sum(end - first for first, end in self._runs)

    def take(self, sizes: Sequence[int]) -> list[Block] | None:
        """Takes a block for each size, in granules; None, and nothing taken, if they do not fit.

        All lie in one run where one is long enough (the shortest such), so that one copy fills
        them; else spread over the longest ones.
        """
        total = sum(sizes)
        whole = [run for run in self._runs if run[1] - run[0] >= total]
        runs = [min(whole, key=_length)] if whole else sorted(self._runs, key=_length, reverse=True)
        blocks: list[Block] = []
        for first, end in runs:
            while len(blocks) < len(sizes) and first + sizes[len(blocks)] <= end:
                blocks.append((first, sizes[len(blocks)]))
                first += sizes[len(blocks) - 1]
        if len(blocks) < len(sizes):
            return None
        for first, size in blocks:
            self._cut(first, first + size)
        return blocks

    def give_back(self, blocks: Sequence[Block]) -> None:
        """Frees blocks, which must be clear."""
        runs = sorted([*self._runs, *((first, first + size) for first, size in blocks if size)])
        self._runs = []
        for first, end in runs:
            if self._runs and self._runs[-1][1] == first:
                self._runs[-1] = (self._runs[-1][0], end)
            else:
                self._runs.append((first, end))

    def fill(self, blocks: Sequence[Block], image: Tensor) -> None:
        """Copies ``image``, the blocks' contents one after the other, into them."""
        at = 0
        for first, size in join_neighbours(blocks):
            _copy(self.part(first, size), image[at * GRANULE : (at + size) * GRANULE])
            at += size

    def clear(self, blocks: Sequence[Block]) -> None:
        """Zeroes blocks."""
        for first, size in join_neighbours(blocks):
            clear(self.part(first, size))

    def part(self, first: int, size: int) -> Tensor:
        return self.buffer[first * GRANULE : (first + size) * GRANULE]

    def _cut(self, first: int, end: int) -> None:
        for i, (a, b) in enumerate(self._runs):
            if a <= first < b:
                self._runs[i : i + 1] = [r for r in ((a, first), (end, b)) if r[0] < r[1]]
                return


def join_neighbours(blocks: Sequence[Block]) -> Iterator[Block]:
    """Yields the blocks, with each that touches the one before joined to it."""
    joined: Block | None = None
    for first, size in blocks:
        if joined and joined[0] + joined[1] == first:
            joined = (joined[0], joined[1] + size)
        else:
            if joined:
                yield joined
            joined = (first, size)
    if joined:
        yield joined


def _length(run: tuple[int, int]) -> int:
    return run[1] - run[0]


def clear(tensor: Tensor) -> None:
    """Zeroes a contiguous tensor."""
    if tensor.is_cuda:
        tensor.zero_()
    else:
        _view_bytes(tensor)[:] = 0


def _copy(target: Tensor, source: Tensor) -> None:
    if target.is_cuda:
        target.copy_(source, non_blocking=True)
    else:
        _view_bytes(target)[:] = _view_bytes(source)


def _view_bytes(host: Tensor) -> Any:
    """Returns numpy's view: it copies in this thread, torch would use those that run the batch."""
    return host.view(torch.uint8).numpy()
