"""The adapters on a device, as batches read them: arenas of pages, and tables of each slot's.

One thread writes, the bank's loader. On a GPU it copies on its own stream, after the work of the
batches that used the place before, and returns when the copies are there: the thread that runs
batches never waits for one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from fastlora.serving.bank.arena import GRANULE, Arena, Block
from fastlora.serving.bank.layout import Image, Kind, Layout

# Where an adapter's pages lie in each arena.
Blocks = dict[Kind, list[Block]]
# The last event of each stream, by the index of its device and its handle.
Events = dict[tuple[int | None, int], torch.cuda.Event]


class Pages(NamedTuple):
    """What a layer reads: A (P, page, K), B (P, page, N), and for each slot (S, ...) the others."""

    lora_A: Tensor
    lora_B: Tensor
    table: Tensor
    ranks: Tensor
    scalings: Tensor


class Tables(NamedTuple):
    """An arena's layers: pages (L, S, pages a slot), ranks (L, S), scalings (L, S)."""

    pages: Tensor
    ranks: Tensor
    scalings: Tensor


class Device:
    """Arenas and tables for ``slots`` adapters, as large as ``nbytes`` allow.

    nbytes: of all arenas together, each gets its share of a whole adapter's; None: so many that
    every slot can hold an adapter of the highest rank in every layer.
    """

    def __init__(self, layout: Layout, slots: int, nbytes: int | None) -> None:
        whole = dict.fromkeys(layout.layers, layout.max_rank)
        most = layout.granules(whole)
        self.layout = layout
        self.arenas: dict[Kind, Arena] = {}
        self.tables: dict[Kind, Tables] = {}
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        for kind, count in layout.counts.items():
            size = slots * most[kind]
            if nbytes is not None:
                size = min(size, size * nbytes // (slots * layout.nbytes(whole)))
            device, dtype = kind
            self.arenas[kind] = Arena(size, dtype, device)
            with torch.inference_mode(False):
                self.tables[kind] = Tables(
                    torch.full((count, slots, layout.pages), -1, dtype=torch.int32, device=device),
                    torch.zeros(count, slots, dtype=torch.int32, device=device),
                    torch.zeros(count, slots, dtype=torch.float32, device=device),
                )
            if device.type == "cuda" and device not in self._streams:
                self._streams[device] = torch.cuda.Stream(device)
        # What has been allocated here is zeroed first.
        for device, stream in self._streams.items():
            stream.wait_stream(torch.cuda.current_stream(device))
        self.pages = {name: self._view(name) for name in layout.layers}

    @property
    def nbytes(self) -> int:
        """Bytes of all arenas, whether adapters lie there or not."""
        return sum(arena.buffer.nbytes for arena in self.arenas.values())

    @property
    def nbytes_taken(self) -> int:
        """Bytes in which adapters lie."""
        sizes = ((a.size - a.free) * GRANULE * a.buffer.itemsize for a in self.arenas.values())
        return sum(sizes)

    def can_hold(self, *ranks: Mapping[str, int]) -> bool:
        """Whether adapters of these ranks would fit beside each other in an empty device."""
        needs = [self.layout.granules(of_adapter) for of_adapter in ranks]
        return all(a.size >= sum(need[kind] for need in needs) for kind, a in self.arenas.items())

    def has_free(self, need: Mapping[Kind, int]) -> bool:
        """Whether so many granules of each arena are free, in one piece or not."""
        return all(self.arenas[kind].free >= n for kind, n in need.items())

    def take(self, image: Image) -> Blocks | None:
        """Takes room for an adapter in every arena; None, and nothing taken, where one has none."""
        blocks: Blocks = {}
        for kind, sizes in image.sizes.items():
            in_arena = self.arenas[kind].take(sizes)
            if in_arena is None:
                for other, taken in blocks.items():
                    self.arenas[other].give_back(taken)
                return None
            blocks[kind] = in_arena
        return blocks

    def write(self, slot: int, image: Image, blocks: Blocks) -> None:
        """Makes ``slot`` the adapter; it is there when this returns."""
        with self._on_own_streams():
            for kind, in_arena in blocks.items():
                self.arenas[kind].fill(in_arena, image.flats[kind])
                firsts = torch.tensor(
                    [first for first, _ in in_arena] + [-1], dtype=torch.int32, device="cpu"
                )
                # The entry -1, of no page, takes the last one.
                rows = (firsts[image.tables[kind].long()], image.ranks[kind], image.scalings[kind])
                for table, row in zip(self.tables[kind], rows, strict=True):
                    table[:, slot].copy_(row)

    def wipe(self, slot: int, blocks: Blocks, after: Events) -> None:
        """Zeroes a slot and its pages and frees them, ``after`` the work that still reads them."""
        with self._on_own_streams(after):
            for kind, in_arena in blocks.items():
                pages, ranks, scalings = self.tables[kind]
                ranks[:, slot], scalings[:, slot], pages[:, slot] = 0, 0, -1
                self.arenas[kind].clear(in_arena)
        for kind, in_arena in blocks.items():
            self.arenas[kind].give_back(in_arena)

    def record_events(self) -> Events:
        """Records events that happen when all that this thread has queued so far is done."""
        events: Events = {}
        for device in self._streams:
            stream, event = torch.cuda.current_stream(device), torch.cuda.Event()
            event.record(stream)
            events[device.index, stream.cuda_stream] = event
        return events

    @contextmanager
    def _on_own_streams(self, after: Events | None = None) -> Iterator[None]:
        with torch.inference_mode(False), torch.no_grad():
            before = {device: torch.cuda.current_stream(device) for device in self._streams}
            try:
                for stream in self._streams.values():
                    for event in (after or {}).values():
                        stream.wait_event(event)
                    torch.cuda.set_stream(stream)
                yield
                for stream in self._streams.values():
                    stream.synchronize()
            finally:
                for stream in before.values():
                    torch.cuda.set_stream(stream)

    def _view(self, name: str) -> Pages:
        layer = self.layout.layers[name]
        lora_A, lora_B = self.layout.views(name, self.arenas[layer.kind])
        pages, ranks, scalings = self.tables[layer.kind]
        i = layer.index
        return Pages(lora_A, lora_B, pages[i], ranks[i], scalings[i])
