"""What the running batch reads of adapters: arenas of pages and the tables that say whose they are.

Written by one thread, the bank's loader. On a GPU it copies on a stream of its own, after what the
batches that used a place before have queued, and returns when the copies are there: the thread that
runs batches never waits for one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from fastlora.serving.bank.arena import GRANULE, Arena, Block
from fastlora.serving.bank.layout import Image, Kind, Layout

Places = dict[Kind, list[Block]]
# The last event of each stream of each device, by its index and the stream's handle.
Passed = dict[tuple[int | None, int], torch.cuda.Event]


class Pages(NamedTuple):
    """What a layer reads: A (P, page, K), B (P, page, N), and of the slots (S, ...) the rest."""

    lora_A: Tensor
    lora_B: Tensor
    table: Tensor
    ranks: Tensor
    scalings: Tensor


class Tables(NamedTuple):
    """Of an arena's layers: pages (L, S, pages a slot), ranks (L, S), scalings (L, S)."""

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
        self.pages = {name: self._pages(name) for name in layout.layers}

    @property
    def nbytes(self) -> int:
        """Of all arenas, whether adapters lie there or not."""
        return sum(arena.buffer.nbytes for arena in self.arenas.values())

    @property
    def nbytes_taken(self) -> int:
        sizes = ((a.size - a.free) * GRANULE * a.buffer.itemsize for a in self.arenas.values())
        return sum(sizes)

    def holds(self, *ranks: Mapping[str, int]) -> bool:
        """Whether adapters of these ranks have room beside each other where there is no other."""
        each = [self.layout.granules(one) for one in ranks]
        return all(a.size >= sum(need[kind] for need in each) for kind, a in self.arenas.items())

    def fits(self, need: Mapping[Kind, int]) -> bool:
        """Whether so many granules of each arena are free, in one piece or not."""
        return all(self.arenas[kind].free >= n for kind, n in need.items())

    def take(self, image: Image) -> Places | None:
        """Room for an adapter in every arena; None, and nothing taken, where one has none."""
        places: Places = {}
        for kind, sizes in image.sizes.items():
            blocks = self.arenas[kind].take(sizes)
            if blocks is None:
                for taken, given in places.items():
                    self.arenas[taken].give_back(given)
                return None
            places[kind] = blocks
        return places

    def write(self, slot: int, image: Image, places: Places) -> None:
        """Makes ``slot`` the adapter; it is there when this returns."""
        with self._aside():
            for kind, blocks in places.items():
                self.arenas[kind].fill(blocks, image.flats[kind])
                firsts = torch.tensor(
                    [first for first, _ in blocks] + [-1], dtype=torch.int32, device="cpu"
                )
                # The entry -1, of no page, takes the last one.
                rows = (firsts[image.tables[kind].long()], image.ranks[kind], image.scalings[kind])
                for table, row in zip(self.tables[kind], rows, strict=True):
                    table[:, slot].copy_(row)

    def wipe(self, slot: int, places: Places, after: Passed) -> None:
        """Zeroes a slot and its pages, which are free then; ``after`` what still reads them."""
        with self._aside(after):
            for kind, blocks in places.items():
                pages, ranks, scalings = self.tables[kind]
                ranks[:, slot], scalings[:, slot], pages[:, slot] = 0, 0, -1
                self.arenas[kind].clear(blocks)
        for kind, blocks in places.items():
            self.arenas[kind].give_back(blocks)

    def passed(self) -> Passed:
        """Events that happen when everything that this thread has queued so far is done."""
        events: Passed = {}
        for device in self._streams:
            stream, event = torch.cuda.current_stream(device), torch.cuda.Event()
            event.record(stream)
            events[device.index, stream.cuda_stream] = event
        return events

    @contextmanager
    def _aside(self, after: Passed | None = None) -> Iterator[None]:
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

    def _pages(self, name: str) -> Pages:
        layer = self.layout.layers[name]
        lora_A, lora_B = self.layout.views(name, self.arenas[layer.kind])
        pages, ranks, scalings = self.tables[layer.kind]
        i = layer.index
        return Pages(lora_A, lora_B, pages[i], ranks[i], scalings[i])
