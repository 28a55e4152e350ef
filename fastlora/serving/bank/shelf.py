"""Who has a place: slots and pages of the device, copies in the host's memory.

The least recently used make room. One thread, the loader, calls what writes to the device, so that
places need no lock; ``lock`` guards who uses what, for microseconds.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Collection
from typing import NamedTuple

from fastlora.serving.bank.device import Device, Passed, Places
from fastlora.serving.bank.entry import BankStats, Entry, Lease
from fastlora.serving.bank.layout import Image, Layout, check_factors, digest


class Left(NamedTuple):
    """What an entry leaves behind: its slot, its pages, and what may still be reading them."""

    slot: int
    places: Places
    passed: Passed


class Shelf:
    """Places on ``device``, and copies of at most ``host_bytes``."""

    def __init__(self, device: Device, slots: int, host_bytes: int) -> None:
        self.device, self.host_bytes = device, host_bytes
        self.lock = threading.Condition(threading.Lock())
        self.counts = BankStats()
        # Least recently used first: who has a slot, who has a copy in the host's memory.
        self.resident: OrderedDict[Entry, None] = OrderedDict()
        self.copied: OrderedDict[Entry, None] = OrderedDict()
        self.host_bytes_used = 0
        # Leases that nobody releases to make room.
        self.pins: dict[str, Lease] = {}
        self._slots = list(range(slots))[::-1]
        # Known no more, but not idle yet.
        self._dropped: list[Entry] = []
        # Nobody is lent anything while the device is exchanged.
        self.moving = False
        # What has been read again, for who waits for its place.
        self.fresh: tuple[Entry, Image] | None = None

    # With the lock held, in any thread.

    def touch(self, entry: Entry) -> None:
        """Makes a resident entry the one most recently used."""
        self.resident.move_to_end(entry)
        if entry in self.copied:
            self.copied.move_to_end(entry)

    def keep_copy(self, entry: Entry, image: Image) -> None:
        """Keeps an entry's copy among the host's, the oldest of which may have to go."""
        entry.image = image
        self.copied[entry] = None
        self.host_bytes_used += image.nbytes
        while self.host_bytes_used > self.host_bytes:
            self._forget_copy(next(iter(self.copied)))

    def drop(self, entry: Entry) -> None:
        """From now on an entry keeps its place only while it is in use."""
        entry.known = False
        self._dropped.append(entry)

    def has_room(self, entry: Entry, leavers: Collection[Entry]) -> bool:
        """Whether there is a slot and enough pages, once ``leavers`` have gone."""
        need = self.device.layout.granules(entry.ranks)
        for other in leavers:
            for kind, blocks in other.places.items():
                need[kind] -= sum(size for _, size in blocks)
        return bool(self._slots or leavers) and self.device.fits(need)

    def _forget_copy(self, entry: Entry) -> None:
        if entry.image is not None:
            self.host_bytes_used -= entry.image.nbytes
            del self.copied[entry]
            entry.image = None

    def _detach(self, entry: Entry) -> Left:
        del self.resident[entry]
        assert entry.slot is not None
        left = Left(entry.slot, entry.places, entry.passed)
        entry.slot, entry.places, entry.passed = None, {}, {}
        return left

    # In the loader alone, without the lock.

    def place(
        self, entry: Entry, image: Image, beside: Collection[Entry], evict: bool = True
    ) -> bool:
        """Gives an entry a slot and pages, if need be of idle ones that are not ``beside`` it."""
        with self.lock:
            idle = [e for e in self.resident if evict and not e.users and e not in beside]
            if not self.has_room(entry, idle):
                return False
        while True:
            places = self.device.take(image) if self._slots else None
            if places is not None:
                break
            if not evict or not self._evict(beside):
                return False
        slot = self._slots.pop()
        try:
            self.device.write(slot, image, places)
        except BaseException:
            self.device.wipe(slot, places, {})
            self._slots.append(slot)
            raise
        with self.lock:
            entry.slot, entry.places = slot, places
            self.resident[entry] = None
            self.counts.loads += 1
        return True

    def image(self, entry: Entry) -> Image:
        """The host's copy of an entry, which may have to be read again: raises what that raises."""
        with self.lock:
            if entry.image is not None:
                return entry.image
        if self.fresh is not None and self.fresh[0] is entry:
            return self.fresh[1]
        factors = entry.read()
        check_factors(factors, self.device.layout)
        if digest(factors) != entry.digest:
            raise RuntimeError(
                f"{entry.name}: its files have changed since it was loaded; load it again"
            )
        image = self.device.layout.image(factors)
        self.fresh = entry, image
        with self.lock:
            self.counts.reads += 1
            self.keep_copy(entry, image)
        return image

    def free_dropped(self) -> None:
        """Takes the places of those that are known no more and idle."""
        with self.lock:
            gone = [entry for entry in self._dropped if entry.idle]
            self._dropped = [entry for entry in self._dropped if not entry.idle]
            for entry in gone:
                self._forget_copy(entry)
            left = [self._detach(entry) for entry in gone if entry.slot is not None]
        for place in left:
            self._wipe(place)

    def rebuild(self, layout: Layout, slots: int, nbytes: int | None) -> None:
        """Another device in the old one's place, with the pinned entries and no other on it.

        All that can fail comes before the exchange.
        """
        with self.lock:
            before = self.device.layout
            if before.layers == layout.layers:
                return
            pinned = list(dict.fromkeys(e for pin in self.pins.values() for e in pin.entries))
            if any(e.users > (e in pinned) for e in self.resident):
                raise RuntimeError("adapters are in use: move or cast the model when no batch runs")
            self.moving, copied = True, {e: e.image for e in self.copied}
        try:
            device = Device(layout, slots, nbytes)
            if not device.holds(*(entry.ranks for entry in pinned)):
                raise RuntimeError(
                    f"device_bytes: pinned adapters need more than {device.nbytes} bytes there; "
                    "unpin some before the model is moved or cast"
                )
            copied |= {entry: self.image(entry) for entry in pinned}
            images = {e: layout.image(before.factors(i)) for e, i in copied.items() if i}
            for entry in list(self.resident):
                for event in entry.passed.values():
                    event.synchronize()
            with self.lock:
                for entry in self.resident:
                    entry.slot, entry.places, entry.passed = None, {}, {}
                self.resident.clear()
                self.device, self._slots, self.fresh = device, list(range(slots))[::-1], None
                for entry in list(self.copied):
                    self._forget_copy(entry)
                    if entry in images:
                        self.keep_copy(entry, images[entry])
            for entry in pinned:
                self.place(entry, images[entry], pinned)
        finally:
            with self.lock:
                self.moving = False

    def _evict(self, beside: Collection[Entry]) -> bool:
        """Takes the place of the least recently used that is idle; False when there is none."""
        with self.lock:
            idle = (e for e in self.resident if not e.users and e not in beside)
            victim = next(idle, None)
            if victim is None:
                return False
            self.counts.evictions += 1
            left = self._detach(victim)
        self._wipe(left)
        return True

    def _wipe(self, left: Left) -> None:
        self.device.wipe(*left)
        self._slots.append(left.slot)
