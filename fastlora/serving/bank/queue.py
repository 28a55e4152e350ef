"""Who waits for a place: whoever cannot be lent an adapter at once gets it in turn.

One thread, the loader, brings adapters to the device: it does all that takes long, so that no batch
waits for more than a lock that is held for microseconds. Who wants only what is there passes those
who wait; the first of them, where all places are in use, has the least recently used lent no more,
as many as it takes, until they are idle.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from concurrent.futures import Future

from fastlora.config.listing import list_some
from fastlora.serving.bank.device import Device
from fastlora.serving.bank.entry import Entry, Lease, Waiter
from fastlora.serving.bank.layout import Image, Layout
from fastlora.serving.bank.shelf import Shelf
from fastlora.serving.bank.worker import Worker


class Residency(Shelf):
    """A shelf, and those who wait for a place on it."""

    def __init__(self, device: Device, slots: int, host_bytes: int) -> None:
        super().__init__(device, slots, host_bytes)
        self._waiting: deque[Waiter] = deque()
        # Who is lent no more, for the first of those; how often anybody has released anything.
        self._leaving: set[Entry] = set()
        self._releases = 0
        self.loader = Worker("fastlora-adapters")
        # Whether the loader will look at those who wait.
        self.poked = False

    # With the lock held, in any thread.

    def lend(self, entries: list[Entry]) -> Future[Lease]:
        """A lease, at once or when the loader has brought what is absent."""
        different = list(dict.fromkeys(entries))
        waiter = Waiter(entries, different, Future())
        absent = sum(entry.slot is None for entry in different)
        self.counts.hits += len(different) - absent
        self.counts.misses += absent
        if self._ready(waiter):
            lease = self._grant(waiter)
            if lease is not None:
                waiter.future.set_result(lease)
            return waiter.future
        for entry in different:
            entry.wanted += 1
        self._waiting.append(waiter)
        waiter.future.add_done_callback(self._given_up)
        self.poke()
        return waiter.future

    def poke(self) -> None:
        """Has the loader look at those who wait; needs no lock."""
        if not self.poked:
            self.poked = True
            self.loader.submit(self._pump)

    def _ready(self, waiter: Waiter) -> bool:
        return not self.moving and all(
            e.slot is not None and e not in self._leaving for e in waiter.different
        )

    def _grant(self, waiter: Waiter) -> Lease | None:
        """What is lent; None where nobody waits any more."""
        if not waiter.future.set_running_or_notify_cancel():
            return None
        for entry in waiter.different:
            entry.users += 1
            self.touch(entry)
        return Lease(waiter.entries, self._give_back)

    def _leave(self, waiter: Waiter) -> None:
        """Takes a waiter from the queue."""
        self._waiting.remove(waiter)
        for entry in waiter.different:
            entry.wanted -= 1
        self.lock.notify_all()

    def _make_leave(self, entry: Entry, beside: Collection[Entry]) -> bool:
        """Has as many lent no more as ``entry`` needs; False when nobody can be waited for."""
        pinned = {e for lease in self.pins.values() for e in lease.entries}
        others = [e for e in self.resident if e not in beside and e not in pinned]
        in_use = [e for e in others if e.users]
        self._leaving.intersection_update(self.resident)
        for other in in_use:
            gone = [e for e in others if not e.users or e in self._leaving]
            # One more than have gone, at least: room in all may be too little in one piece.
            if any(e.users for e in self._leaving) and self.has_room(entry, gone):
                break
            self._leaving.add(other)
        return bool(in_use)

    # Without the lock, in any thread.

    def _give_back(self, lease: Lease) -> None:
        with self.lock:
            # Recorded in the order in which they count: each stream's last is the one to wait for.
            passed = self.device.passed()
            for entry in dict.fromkeys(lease.entries):
                entry.users -= 1
                entry.passed.update(passed)
            self._releases += 1
            self.lock.notify_all()
            needed = self._leaving or not all(entry.known for entry in lease.entries)
        if needed:
            self.poke()

    def _given_up(self, future: Future[Lease]) -> None:
        if future.cancelled():
            self.poke()

    # Without the lock, in the loader alone.

    def _pump(self) -> None:
        """Frees what was dropped and serves the next who wait; then other tasks have their turn."""
        self.poked = False
        self.free_dropped()
        if self._serve_next():
            self.poke()

    def settle(self, entry: Entry, image: Image) -> None:
        """Brings a new entry to the device where nobody has to leave for it."""
        self.free_dropped()
        with self.lock:
            same = self.device.layout is image.layout
            wanted = same and entry.known and entry.slot is None and not self._waiting
        if wanted:
            self.place(entry, image, (), evict=False)

    def move(self, layout: Layout, slots: int, nbytes: int | None) -> None:
        """``rebuild``, and then those who have waited for it."""
        try:
            self.rebuild(layout, slots, nbytes)
        finally:
            self.poke()

    def _serve_next(self) -> bool:
        """Whether to go on: where the first of those who wait has come closer to what it wants."""
        self._serve_ready()
        with self.lock:
            if not self._waiting:
                return False
            waiter, seen = self._waiting[0], self._releases
            entry = next((e for e in waiter.different if e.slot is None), None)
            if entry is None:
                self._end_turn()
                return True
        try:
            placed = self.place(entry, self.image(entry), waiter.different)
        except BaseException as error:
            self._fail(waiter, error)
            return True
        with self.lock:
            if placed:
                self._end_turn()
            if placed or self._releases != seen:
                return True
            if self._make_leave(entry, waiter.different):
                return False
            pinned = list_some(set(self.pins)) or "nothing"
        names = list_some(e.name for e in waiter.different if e is not entry) or "nothing"
        what = f"what is pinned ({pinned}) and runs beside it ({names}) leaves no room"
        if not self.device.holds(entry.ranks):
            what = f"it is larger than the device's {self.device.nbytes} bytes of pages"
        self._fail(waiter, RuntimeError(f"{entry.name}: {what}"))
        return True

    def _end_turn(self) -> None:
        """Nobody has to leave, and nothing is kept, for the first of those who wait any more."""
        self._leaving.clear()
        self.fresh = None

    def _serve_ready(self) -> None:
        """Lends to all who wait for nothing but that somebody looks, and forgets who gave up."""
        with self.lock:
            first = self._waiting[0] if self._waiting else None
            ready = [w for w in self._waiting if w.future.cancelled() or self._ready(w)]
            for waiter in ready:
                self._leave(waiter)
            leases = [(waiter, self._grant(waiter)) for waiter in ready]
            if first in ready:
                self._end_turn()
        # Without the lock: it may call back.
        for waiter, lease in leases:
            if lease is not None:
                waiter.future.set_result(lease)

    def _fail(self, waiter: Waiter, error: BaseException) -> None:
        with self.lock:
            self._end_turn()
            self._leave(waiter)
        if waiter.future.set_running_or_notify_cancel():
            waiter.future.set_exception(error)
