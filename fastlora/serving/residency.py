"""Who is on the device: those who wait are served in order, the least recently used make room.

One thread, the loader, does all that takes long or writes to the device, so that neither needs a
lock; ``lock`` guards who uses and who waits, for microseconds, and no batch ever waits for more.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import torch

from fastlora.serving.device import Device, Places
from fastlora.serving.entry import BankStats, Entry, Lease, Waiter
from fastlora.serving.layout import Image, Layout, check_factors, digest


class Left(NamedTuple):
    """What an entry leaves behind: its slot, its pages, and what may still be reading them."""

    slot: int
    places: Places
    passed: list[torch.cuda.Event]


class Residency:
    """The slots and pages of ``device``, and the host's copies, of at most ``host_bytes``."""

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
        self._waiting: deque[Waiter] = deque()
        # Known no more, but not idle yet.
        self._dropped: list[Entry] = []
        # What has been read again for the first of those who wait, until it has a place.
        self._fresh: tuple[Entry, Image] | None = None
        # Whether the first of those waits for others to release what they hold, and how often
        # somebody has done so.
        self._starved, self._releases = False, 0
        self._loader = ThreadPoolExecutor(1, "fastlora-adapters")

    # Called from any thread; ``lend`` and ``keep_copy`` with the lock held, ``in_loader`` without.

    def in_loader(self, work: Callable[..., Any], *args: Any) -> Any:
        """What ``work`` returns, in the loader, when it has done what it was asked before."""
        return self._loader.submit(work, *args).result()

    def lend(self, entries: list[Entry]) -> Future[Lease]:
        """A lease, at once or when the loader has brought what is absent."""
        different = list(dict.fromkeys(entries))
        waiter = Waiter(entries, different, Future())
        absent = sum(entry.slot is None for entry in different)
        self.counts.hits += len(different) - absent
        self.counts.misses += absent
        if not absent and not self._starved:
            lease = self._grant(waiter)
            if lease is not None:
                waiter.future.set_result(lease)
            return waiter.future
        for entry in different:
            entry.wanted += 1
        self._waiting.append(waiter)
        self._loader.submit(self.pump)
        return waiter.future

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

    def _forget_copy(self, entry: Entry) -> None:
        if entry.image is not None:
            self.host_bytes_used -= entry.image.nbytes
            del self.copied[entry]
            entry.image = None

    def _give_back(self, lease: Lease) -> None:
        passed = self.device.passed()
        with self.lock:
            for entry in dict.fromkeys(lease.entries):
                entry.users -= 1
                entry.passed = [*entry.passed, *passed] if entry.users else passed
            self._releases += 1
            self.lock.notify_all()
            needed = self._starved or not all(entry.known for entry in lease.entries)
        if needed:
            self._loader.submit(self.pump)

    def _grant(self, waiter: Waiter) -> Lease | None:
        """What is lent; None where nobody waits any more."""
        if not waiter.future.set_running_or_notify_cancel():
            return None
        for entry in waiter.different:
            entry.users += 1
            self.resident.move_to_end(entry)
            if entry in self.copied:
                self.copied.move_to_end(entry)
        return Lease(waiter.entries, self._give_back)

    # Called in the loader alone.

    def pump(self) -> None:
        """Frees what was dropped, then serves those who wait, until one must wait for others."""
        self._free_dropped()
        while self._serve_next():
            self._free_dropped()

    def _serve_next(self) -> bool:
        """Whether it was worth while: it is when the first of those who wait has come closer."""
        with self.lock:
            self._starved, seen = False, self._releases
            if not self._waiting:
                return False
            waiter = self._waiting[0]
            absent = [e for e in waiter.different if e.slot is None]
            done, lease = not absent or waiter.future.cancelled(), None
            if done:
                lease = self._leave(waiter)
        # Without the lock: it may call back.
        if lease is not None:
            waiter.future.set_result(lease)
        if done:
            return True
        try:
            # Files first: whoever waits for them holds up nobody, who waits for room holds up all.
            image = self._image(absent[0])
            if self.place(absent[0], image, waiter.different):
                return True
        except Exception as error:
            self._fail(waiter, error)
            return True
        with self.lock:
            if self._releases != seen:
                return True
            pinned = ", ".join(sorted(self.pins)) or "none"
            self._starved = sum(e.users for e in self.resident) > len(self.pins)
            if self._starved:
                return False
        what = f"{absent[0].name}: pinned adapters leave it no room (pinned: {pinned})"
        self._fail(waiter, RuntimeError(what))
        return True

    def settle(self, entry: Entry, image: Image) -> None:
        """Brings a new entry to the device where nobody has to leave for it."""
        self.pump()
        with self.lock:
            wanted = entry.known and entry.slot is None and not self._waiting
        if wanted:
            self.place(entry, image, (), evict=False)

    def place(
        self, entry: Entry, image: Image, beside: Collection[Entry], evict: bool = True
    ) -> bool:
        """Gives an entry a slot and pages, if need be of idle ones that are not ``beside`` it."""
        if not self._possible(entry, beside if evict else self.resident):
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
            self.device.wipe(slot, places, [])
            self._slots.append(slot)
            raise
        with self.lock:
            entry.slot, entry.places = slot, places
            self.resident[entry] = None
            self.counts.loads += 1
        return True

    def rebuild(self, layout: Layout, slots: int, nbytes: int | None) -> None:
        """Another device in the old one's place, with the pinned entries and no other on it."""
        with self.lock:
            pinned = [entry for lease in self.pins.values() for entry in lease.entries]
            if sum(e.users for e in self.resident) > len(pinned) or self._waiting:
                raise RuntimeError("adapters are in use: move or cast the model when no batch runs")
            before = self.device.layout
        device = Device(layout, slots, nbytes)
        with self.lock:
            for entry in self.resident:
                entry.slot, entry.places, entry.passed = None, {}, []
            for entry in self.copied:
                assert entry.image is not None
                self.host_bytes_used -= entry.image.nbytes
                entry.image = layout.image(before.factors(entry.image))
                self.host_bytes_used += entry.image.nbytes
            self.resident.clear()
            self.device, self._slots = device, list(range(slots))[::-1]
        for entry in pinned:
            self.place(entry, self._image(entry), pinned)

    def _possible(self, entry: Entry, beside: Collection[Entry]) -> bool:
        """Whether there is room, or enough of those that could make it are idle."""
        with self.lock:
            idle = [e for e in self.resident if not e.users and e not in beside]
        need = self.device.layout.granules(entry.ranks)
        for other in idle:
            for kind, blocks in other.places.items():
                need[kind] -= sum(size for _, size in blocks)
        return bool(self._slots or idle) and self.device.fits(need)

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

    def _free_dropped(self) -> None:
        with self.lock:
            gone = [entry for entry in self._dropped if entry.idle]
            self._dropped = [entry for entry in self._dropped if not entry.idle]
            for entry in gone:
                self._forget_copy(entry)
            left = [self._detach(entry) for entry in gone if entry.slot is not None]
        for place in left:
            self._wipe(place)

    def _detach(self, entry: Entry) -> Left:
        del self.resident[entry]
        assert entry.slot is not None
        left = Left(entry.slot, entry.places, entry.passed)
        entry.slot, entry.places, entry.passed = None, {}, []
        return left

    def _wipe(self, left: Left) -> None:
        self.device.wipe(*left)
        self._slots.append(left.slot)

    def _image(self, entry: Entry) -> Image:
        """The host's copy of an entry, which may have to be read again."""
        with self.lock:
            if entry.image is not None:
                return entry.image
            if self._fresh is not None and self._fresh[0] is entry:
                return self._fresh[1]
            ready = [w for w in self._waiting if all(e.slot is not None for e in w.different)]
            leases = [(waiter, self._leave(waiter)) for waiter in ready]
        for waiter, lease in leases:
            if lease is not None:
                waiter.future.set_result(lease)
        factors = entry.read()
        check_factors(factors, self.device.layout)
        if digest(factors) != entry.digest:
            raise RuntimeError(
                f"{entry.name}: its files have changed since it was loaded; load it again"
            )
        image = self.device.layout.image(factors)
        with self.lock:
            self.counts.reads += 1
            self._fresh = entry, image
            self.keep_copy(entry, image)
        return image

    def _leave(self, waiter: Waiter) -> Lease | None:
        """Under the lock: takes a waiter from the queue, and lends what it asked for if it is there."""
        self._waiting.remove(waiter)
        self._fresh = None
        for entry in waiter.different:
            entry.wanted -= 1
        self.lock.notify_all()
        absent = any(entry.slot is None for entry in waiter.different)
        return None if absent else self._grant(waiter)

    def _fail(self, waiter: Waiter, error: BaseException) -> None:
        with self.lock:
            self._leave(waiter)
        if waiter.future.set_running_or_notify_cancel():
            waiter.future.set_exception(error)
