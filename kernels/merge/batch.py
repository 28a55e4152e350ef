"""Weights of one kind in one launch: their tables, the state of every tile, and the way back."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

# (lora_A (R, K), lora_B (N, R), scaling)
Adapter = tuple[Tensor, Tensor, float]
RAW = {2: torch.int16, 4: torch.int32}
PACK = {2: torch.int32, 4: torch.int64}
# Of the elements a receipt keeps about 0.2 / 1.3 / 7.6 % at |d| / |W| = 0.001 / 0.01 / 0.1: room
# for one in this many is made at first, and where it is too little for the rest exactly.
SHARE = 32
SPARE = 128


class State(IntEnum):
    """Of a tile: yet to be worked on, or how that went; all but DONE left it as it was."""

    FRESH = 0
    DONE = 1
    NOT_FINITE = 2
    NOT_MERGED = 3
    NOT_RESTORED = 4
    NO_ROOM = 5


class Job(NamedTuple):
    """A weight (N, K), what to take out of it (with its receipt's parts) and what to put in."""

    index: int  # among the call's weights
    weight: Tensor
    old: list[Adapter]
    new: list[Adapter]
    receipt: Sequence[Tensor] = ()  # positions, bits, counts, checksums


class How(NamedTuple):
    """What a call does: takes out, puts in, with checksums before and after."""

    undo: bool
    merge: bool
    sums: bool


class Kind(NamedTuple):
    """What a kernel is compiled for."""

    dtype: torch.dtype
    # Of what is taken out and of what is put in: the same numbers in another dtype would be
    # multiplied another way.
    old: torch.dtype
    new: torch.dtype
    inner: int
    aligned: bool
    lora_aligned: bool


def kind_of(job: Job) -> Kind:
    weight, factors = job.weight, [t for A, B, _ in job.old + job.new for t in (A, B)]
    N, K = weight.shape
    inner = next((d for d in (1, 0) if weight.stride(d) == 1 or weight.shape[d] == 1), 2)
    outer = weight.stride(1 - inner) if inner < 2 else 1
    aligned = weight.data_ptr() % 16 == 0 and all(v % 8 == 0 for v in (N, K, outer))
    old, new = (some[0][0].dtype if some else weight.dtype for some in (job.old, job.new))
    fit = all(t.data_ptr() % 16 == 0 and t.stride(0) % 8 == 0 for t in factors)
    ranks = all(A.shape[0] % 8 == 0 and K % 8 == 0 for A, _, _ in job.old + job.new)
    return Kind(weight.dtype, old, new, inner, aligned, fit and ranks)


def as_read(adapters: Sequence[Adapter]) -> list[Adapter]:
    """Factors of one dtype with unit columns, as the kernel takes them: copies only where not."""
    dtypes = {t.dtype for A, B, _ in adapters for t in (A, B)}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    dtype = torch.float32 if dtype == torch.float64 else dtype
    return [(_columns(A.to(dtype)), _columns(B.to(dtype)), s) for A, B, s in adapters]


def _columns(t: Tensor) -> Tensor:
    return t if t.stride(1) == 1 else t.contiguous()


class Tables(NamedTuple):
    """What a launch reads of its weights, adapters and old receipts; see the kernels."""

    weights: Tensor
    adapters: Tensor
    scales: Tensor
    weight_of: Tensor
    alive: Any  # keeps what the tables point to


class Kernels(Protocol):
    """What changes the tiles: Triton's kernels or CUDA's."""

    tile: tuple[int, int]

    def swap(
        self,
        batch: Batch,
        tables: Tables,
        wanted: int,
        before: tuple[Tensor, Tensor, Tensor],
        kind: Kind,
        how: How,
        *,
        keep: bool,
        pooled: bool,
    ) -> None:
        """Every tile in state ``wanted``; before: sums, counts and offsets of the old receipts."""
        ...

    def gather(
        self,
        positions: Tensor,
        bits: Tensor,
        pool: Tensor,
        starts: Tensor,
        offsets: Tensor,
        counts: Tensor,
    ) -> None:
        """positions and bits (P,) from where the tiles left them to where they start."""
        ...


def tiles_of(weight: Tensor, tile: tuple[int, int]) -> int:
    N, K = weight.shape
    return -(-N // tile[0]) * -(-K // tile[1])


class Batch:
    """Jobs of one kind. ``run`` changes the weights, ``take_back`` undoes what it did to them."""

    def __init__(self, kernels: Kernels, kind: Kind, jobs: list[Job], how: How) -> None:
        self.kernels, self.kind, self.jobs = kernels, kind, jobs
        self.undo, self.merge, self.sums = how
        self.device = jobs[0].weight.device
        self.sizes = [tiles_of(job.weight, kernels.tile) for job in jobs]
        self.tiles = sum(self.sizes)
        self.states = self._zeros(self.tiles, torch.int32)
        self.counts = self._zeros(self.tiles, torch.int32)
        self.offsets = self._zeros(self.tiles, torch.int64)
        self.checksums = self._zeros(2 * self.tiles, torch.int64)
        self.cursor = self._zeros(1, torch.int64)
        elements = sum(job.weight.numel() for job in jobs)
        self.capacity = elements // SHARE + SPARE if self.merge else 0
        self.pool = self._pool(self.capacity)
        self._before = self._old() if self.undo else None
        self._tables = self._tables_of([(j.old, j.new, j.receipt) for j in jobs])
        # Made before anything is written: what takes it back must not want for memory.
        self._back = self._tables_of([(j.new, j.old, (self.pool, self.pool)) for j in jobs])

    def run(self) -> None:
        self._launch(State.FRESH)

    def settle(self) -> tuple[Tensor, Tensor]:
        """Waits; states and counts (tiles,) on the host, every tile with room for its receipt."""
        states, counts = self._seen()
        without = states == State.NO_ROOM
        if bool(without.any()):
            need = int(counts[without].sum())
            larger = self._pool(self.capacity + need)
            larger[: self.capacity].copy_(self.pool)
            self.cursor.fill_(self.capacity)
            back = self._tables_of([(j.new, j.old, (larger, larger)) for j in self.jobs])
            self.pool, self.capacity, self._back = larger, self.capacity + need, back
            self._launch(State.NO_ROOM)
            states, counts = self._seen()
        return states, counts

    def take_back(self) -> None:
        """Every tile that was changed, as it was."""
        kind = self.kind._replace(old=self.kind.new, new=self.kind.old)
        how = How(self.merge, self.undo, self.sums and self.merge)
        before = (self.checksums, self.counts, self.offsets)
        self._call(State.DONE, self._back, before, kind, how, keep=False, pooled=True)

    def refused(self, states: Tensor) -> list[tuple[int, int]]:
        """(index, state) of every weight with a tile that was not changed."""
        found = []
        for job, own in zip(self.jobs, states.split(self.sizes), strict=True):
            bad = own[own != State.DONE]
            found += [(job.index, int(bad[0]))] if bad.numel() else []
        return found

    def receipts(self, counts: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Positions, bits, counts and checksums in the order of the tiles, and how many of them
        are whose (jobs, 3); counts (tiles,) on the host.
        """
        ends = counts.to(torch.int64).cumsum(0)
        total = int(ends[-1]) if self.tiles else 0
        positions, bits, *_ = self.nothing(total)
        if total:
            starts = (ends - counts).to(self.device)
            own = (self.pool, starts, self.offsets, self.counts)
            self.kernels.gather(positions, bits, *own)
        own = [[int(c.sum()), c.numel(), 2 * c.numel()] for c in counts.split(self.sizes)]
        return positions, bits, counts, self.checksums, torch.tensor(own, dtype=torch.int64)

    def nothing(self, elements: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Receipts of no tiles, with room for so many elements."""
        return (
            torch.empty(elements, dtype=torch.int16, device=self.device),
            torch.empty(elements, dtype=RAW[self.kind.dtype.itemsize], device=self.device),
            torch.empty(0, dtype=torch.int32),
            torch.empty(0, dtype=torch.int64, device=self.device),
            torch.zeros(len(self.jobs), 3, dtype=torch.int64),
        )

    def _launch(self, wanted: int) -> None:
        how = How(self.undo, self.merge, self.sums)
        before = self._before or (self.checksums, self.counts, self.offsets)
        self._call(wanted, self._tables, before, self.kind, how, keep=self.merge)

    def _call(
        self, wanted: int, tables: Tables, before: tuple[Tensor, Tensor, Tensor], kind: Kind,
        how: How,
        *, keep: bool, pooled: bool = False,
    ) -> None:  # fmt: skip
        if self.tiles:
            self.kernels.swap(self, tables, wanted, before, kind, how, keep=keep, pooled=pooled)

    def _tables_of(self, jobs: Sequence[tuple[list[Adapter], list[Adapter], Any]]) -> Tables:
        rows: list[list[int]] = []
        adapters: list[Adapter] = []
        tile = 0
        for job, size, (old, new, receipt) in zip(self.jobs, self.sizes, jobs, strict=True):
            weight = job.weight
            lists = [len(adapters), len(old), len(adapters) + len(old), len(new)]
            pointers = [t.data_ptr() for t in receipt[:2]] if receipt else [0, 0]
            place = [tile, max(1, -(-weight.shape[1] // self.kernels.tile[1]))]
            rows.append(
                [weight.data_ptr(), *weight.stride(), *weight.shape, *place, *lists, *pointers]
            )
            adapters += [*old, *new]
            tile += size
        factors = [
            [A.data_ptr(), A.stride(0), B.data_ptr(), B.stride(0), A.shape[0]]
            for A, B, _ in adapters
        ]
        sizes = torch.tensor(self.sizes, device=self.device)
        weight_of = torch.arange(len(sizes), device=self.device, dtype=torch.int32)
        return Tables(
            self._table(rows),
            self._table(factors or [[0] * 5]),
            torch.tensor([s for *_, s in adapters] or [0.0], dtype=torch.float32).to(self.device),
            weight_of.repeat_interleave(sizes, output_size=self.tiles),
            jobs,
        )

    def _table(self, rows: list[list[int]]) -> Tensor:
        return torch.tensor(rows, dtype=torch.int64).to(self.device)

    def _old(self) -> tuple[Tensor, Tensor, Tensor]:
        """Checksums, counts and offsets of the receipts given, for every tile."""
        counts = torch.cat([job.receipt[2] for job in self.jobs])
        offsets = [c.to(torch.int64).cumsum(0) - c for c in counts.split(self.sizes)]
        sums = torch.cat([job.receipt[3].reshape(-1) for job in self.jobs])
        return sums, counts.to(self.device), torch.cat(offsets).to(self.device)

    def _pool(self, size: int) -> Tensor:
        """Elements of a receipt, position and bits in one number."""
        return torch.empty(size, dtype=PACK[self.kind.dtype.itemsize], device=self.device)

    def _zeros(self, size: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(size, dtype=dtype, device=self.device)

    def _seen(self) -> tuple[Tensor, Tensor]:
        states, counts = torch.stack((self.states, self.counts)).cpu()
        # A tensor of its own, since receipts keep it.
        return states, counts.clone()
