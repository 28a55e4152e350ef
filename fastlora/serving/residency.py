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
    """The slots and pages of ``device``, and the host's copies, of at most ``host_bytes``.

    known: whether a bank still knows an entry; others keep their place until they are idle.
    """

    def __init__(
        self, device: Device, slots: int, host_bytes: int, known: Callable[[Entry], bool]
    ) -> None:
        self.device, self.host_bytes, self.known = device, host_bytes, known
        self.lock = threading.Condition(threading.Lock())
        self.counts = BankStats()
        # Least recently used first: who has a slot, who has a copy in the host's memory.
        self.resident: OrderedDict[Entry, None] = OrderedDict()
        self.copied: OrderedDict[Entry, None] = OrderedDict()
        # Leases that nobody releases to make room.
        self.pins: dict[str, Lease] = {}
        self._slots = list(range(slots))[::-1]
        self._waiting: deque[Waiter] = deque()
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

    def keep_copy(self, entry: Entry) -> None:
        """Counts an entry's copy among the host's, the oldest of which may have to go."""
        self.copied[entry] = None
        total = sum(e.image.nbytes for e in self.copied if e.image)
        while total > self.host_bytes:
            oldest, _ = self.copied.popitem(last=False)
            total -= oldest.image.nbytes if oldest.image else 0
            oldest.image = None

    def _give_back(self, lease: Lease) -> None:
        passed = self.device.passed()
        with self.lock:
            for entry in dict.fromkeys(lease.entries):
                entry.users -= 1
                entry.passed = [*entry.passed, *passed] if entry.users else passed
            self._releases += 1
            self.lock.notify_all()
            needed = self._starved or not all(map(self.known, lease.entries))
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
        """Frees what is known no more, then serves those who wait, until one waits for others."""
        self._drop_unknown()
        while True:
            with self.lock:
                self._starved, seen = False, self._releases
                if not self._waiting:
                    return
                waiter = self._waiting[0]
                absent = [e for e in waiter.different if e.slot is None]
                done, lease = not absent or waiter.future.cancelled(), None
                if done:
                    self._next(waiter)
                    lease = self._grant(waiter)
            # Without the lock: it may call back.
            if lease is not None:
                waiter.future.set_result(lease)
            if done:
                continue
            try:
                if self.place(absent[0], waiter.different):
                    continue
            except Exception as error:
                self._fail(waiter, error)
                continue
            with self.lock:
                if self._releases != seen:
                    continue
                pinned = sum(len(lease.entries) for lease in self.pins.values())
                self._starved = sum(e.users for e in self.resident) > pinned
                if self._starved:
                    return
            names = ", ".join(sorted(self.pins)) or "none"
            self._fail(
                waiter,
                RuntimeError(
                    f"{absent[0].name}: pinned adapters leave it no room (pinned: {names})"
                ),
            )

    def settle(self, entry: Entry) -> None:
        """Brings a new entry to the device where nobody has to leave for it."""
        self.pump()
        with self.lock:
            wanted = self.known(entry) and entry.slot is None and not self._waiting
        if wanted:
            self.place(entry, (), evict=False)

    def place(self, entry: Entry, beside: Collection[Entry], evict: bool = True) -> bool:
        """Gives an entry a slot and pages, if need be of idle ones that are not ``beside`` it."""
        if not self._possible(entry, beside if evict else self.resident):
            return False
        image = self._image(entry)
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
            for entry in {*self.copied, *self.resident}:
                self._relay(entry, before, layout)
            self.resident.clear()
            self.device, self._slots = device, list(range(slots))[::-1]
        for entry in pinned:
            self.place(entry, pinned)

    @staticmethod
    def _relay(entry: Entry, before: Layout, layout: Layout) -> None:
        if entry.image is not None:
            entry.image = layout.image(before.factors(entry.image))

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

    def _drop_unknown(self) -> None:
        with self.lock:
            unknown = [e for e in {*self.resident, *self.copied} if e.idle and not self.known(e)]
            for entry in unknown:
                self.copied.pop(entry, None)
                entry.image = None
            left = [self._detach(entry) for entry in unknown if entry.slot is not None]
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
        factors = entry.read()
        check_factors(factors, self.device.layout)
        if digest(factors) != entry.digest:
            raise RuntimeError(
                f"{entry.name}: its files have changed since it was loaded; load it again"
            )
        image = self.device.layout.image(factors)
        with self.lock:
            self.counts.reads += 1
            if self.known(entry):
                entry.image = image
                self.keep_copy(entry)
        return image

    def _next(self, waiter: Waiter) -> None:
        self._waiting.popleft()
        for entry in waiter.different:
            entry.wanted -= 1
        self.lock.notify_all()

    def _fail(self, waiter: Waiter, error: BaseException) -> None:
        with self.lock:
            self._next(waiter)
        if waiter.future.set_running_or_notify_cancel():
            waiter.future.set_exception(error)
