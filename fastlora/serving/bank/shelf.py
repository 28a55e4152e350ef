"""Which adapters have a place on the device, and which a copy in the host's memory.

The least recently used make room. Only one thread, the loader, writes to the device, so places need
no lock; the bank's lock guards which leases use what, and is held for microseconds.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Collection
from typing import NamedTuple

from fastlora.serving.bank.device import Blocks, Device, Events
from fastlora.serving.bank.entry import Entry
from fastlora.serving.bank.layout import Image, Layout, check_factors, hash_factors
from fastlora.serving.bank.lease import Lease
from fastlora.serving.bank.stats import BankStats


class Place(NamedTuple):
    """Where an adapter was on the device, and the events after which nothing reads it there."""

    slot: int
    blocks: Blocks
    events: Events


class Shelf:
    """Places on ``device``, and copies of at most ``host_bytes``."""

    def __init__(
        self, device: Device, slots: int, host_bytes: int, lock: threading.Condition
    ) -> None:
        self.device, self.host_bytes, self._lock = device, host_bytes, lock
        self.counts = BankStats()
        # Least recently used first: entries with a slot, entries with a copy in the host's memory.
        self.resident: OrderedDict[Entry, None] = OrderedDict()
        self.copied: OrderedDict[Entry, None] = OrderedDict()
        self.host_bytes_used = 0
        # Leases that are never released to make room.
        self.pins: dict[str, Lease] = {}
        self._slots = list(range(slots))[::-1]
        # Entries that the bank has forgotten, until they are idle.
        self._dropped: list[Entry] = []
        # Whether the device is being exchanged; nothing can be leased then.
        self.is_moving = False
        # The copy that was read last, for the first waiter, while it waits for its place.
        self.fresh: tuple[Entry, Image] | None = None

    # With the lock held, in any thread.

    def touch(self, entry: Entry) -> None:
        """Makes a resident entry the one most recently used."""
        self.resident.move_to_end(entry)
        if entry in self.copied:
            self.copied.move_to_end(entry)

    def keep_copy(self, entry: Entry, image: Image) -> None:
        """Keeps an entry's copy in the host's memory, from which the oldest may have to go."""
        entry.image = image
        self.copied[entry] = None
        self.host_bytes_used += image.nbytes
        while self.host_bytes_used > self.host_bytes:
            self._forget_copy(next(iter(self.copied)))

    def drop(self, entry: Entry) -> None:
        """Lets an entry keep its place only for as long as it is in use."""
        entry.known = False
        self._dropped.append(entry)

    def has_room(self, entry: Entry, leavers: Collection[Entry]) -> bool:
        """Whether there is a slot and enough pages, once ``leavers`` have gone."""
        need = self.device.layout.granules(entry.ranks)
        for other in leavers:
            for kind, blocks in other.blocks.items():
                need[kind] -= sum(size for _, size in blocks)
        return bool(self._slots or leavers) and self.device.has_free(need)

    def _forget_copy(self, entry: Entry) -> None:
        if entry.image is not None:
            self.host_bytes_used -= entry.image.nbytes
            del self.copied[entry]
            entry.image = None

    def _detach(self, entry: Entry) -> Place:
        del self.resident[entry]
        assert entry.slot is not None
        place = Place(entry.slot, entry.blocks, entry.events)
        entry.slot, entry.blocks, entry.events = None, {}, {}
        return place

    # In the loader alone, without the lock.

    def place(
        self, entry: Entry, image: Image, beside: Collection[Entry], evict: bool = True
    ) -> bool:
        """Gives an entry a slot and pages, if need be of idle ones that are not ``beside`` it."""
        with self._lock:
            idle = [e for e in self.resident if evict and not e.users and e not in beside]
            if not self.has_room(entry, idle):
                return False
        while True:
            blocks = self.device.take(image) if self._slots else None
            if blocks is not None:
                break
            if not evict or not self._evict(beside):
                return False
        slot = self._slots.pop()
        try:
            self.device.write(slot, image, blocks)
        except BaseException:
            self.device.wipe(slot, blocks, {})
            self._slots.append(slot)
            raise
        with self._lock:
            entry.slot, entry.blocks = slot, blocks
            self.resident[entry] = None
            self.counts.loads += 1
        return True

    def image(self, entry: Entry) -> Image:
        """Returns the host's copy of an entry, read again if need be: raises what that raises."""
        with self._lock:
            if entry.image is not None:
                return entry.image
        if self.fresh is not None and self.fresh[0] is entry:
            return self.fresh[1]
        factors = entry.read()
        check_factors(factors, self.device.layout)
        if hash_factors(factors) != entry.digest:
            raise RuntimeError(
                f"{entry.name}: its files have changed since it was loaded; load it again"
            )
        image = self.device.layout.image(factors)
        self.fresh = entry, image
        with self._lock:
            self.counts.reads += 1
            self.keep_copy(entry, image)
        return image

    def free_dropped(self) -> None:
        """Frees the places of dropped entries that are idle."""
        with self._lock:
            idle = [entry for entry in self._dropped if entry.is_idle]
            self._dropped = [entry for entry in self._dropped if not entry.is_idle]
            for entry in idle:
                self._forget_copy(entry)
            places = [self._detach(entry) for entry in idle if entry.slot is not None]
        for place in places:
            self._wipe(place)

    def rebuild(self, layout: Layout, slots: int, nbytes: int | None) -> None:
        """Exchanges the device for a new one, with the pinned entries on it and no others.

        All that can fail comes before the exchange.
        """
        with self._lock:
            before = self.device.layout
            if before.layers == layout.layers:
                return
            pinned = list(dict.fromkeys(e for pin in self.pins.values() for e in pin.entries))
            if any(e.users > (e in pinned) for e in self.resident):
                raise RuntimeError("adapters are in use: move or cast the model when no batch runs")
            self.is_moving, copied = True, {e: e.image for e in self.copied}
        try:
            device = Device(layout, slots, nbytes)
            if not device.can_hold(*(entry.ranks for entry in pinned)):
                raise RuntimeError(
                    f"device_bytes: pinned adapters need more than {device.nbytes} bytes there; "
                    "unpin some before the model is moved or cast"
                )
            copied |= {entry: self.image(entry) for entry in pinned}
            images = {e: layout.image(before.factors(i)) for e, i in copied.items() if i}
            for entry in list(self.resident):
                for event in entry.events.values():
                    event.synchronize()
            with self._lock:
                for entry in self.resident:
                    entry.slot, entry.blocks, entry.events = None, {}, {}
                self.resident.clear()
                self.device, self._slots, self.fresh = device, list(range(slots))[::-1], None
                for entry in list(self.copied):
                    self._forget_copy(entry)
                    if entry in images:
                        self.keep_copy(entry, images[entry])
            for entry in pinned:
                self.place(entry, images[entry], pinned)
        finally:
            with self._lock:
                self.is_moving = False

    def _evict(self, beside: Collection[Entry]) -> bool:
        """Frees the place of the least recently used idle entry; False when there is none."""
        with self._lock:
            idle = (e for e in self.resident if not e.users and e not in beside)
            victim = next(idle, None)
            if victim is None:
                return False
            self.counts.evictions += 1
            place = self._detach(victim)
        self._wipe(place)
        return True

    def _wipe(self, place: Place) -> None:
        self.device.wipe(*place)
        self._slots.append(place.slot)
