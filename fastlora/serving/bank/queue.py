"""Queue for adapters that are not on the device; served in order.

One thread, the loader, copies adapters to the device and does all else that takes long, so that no
batch waits for more than a lock that is held for microseconds. A caller whose adapters are all on
the device need not queue. Where every place is in use, the first in the queue reserves the places
of as many of the least recently used adapters as it needs: they cannot be leased again before they
have been idle and made room.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Collection
from concurrent.futures import Future
from typing import NamedTuple

from fastlora.config.listing import list_some
from fastlora.serving.bank.entry import Entry
from fastlora.serving.bank.layout import Image, Layout
from fastlora.serving.bank.lease import Lease
from fastlora.serving.bank.shelf import Shelf
from fastlora.serving.bank.worker import Worker


class Waiter(NamedTuple):
    """A caller that wants a lease: the adapters that it asked for, each once, and its promise."""

    entries: list[Entry]
    distinct: list[Entry]
    future: Future[Lease]


class LeaseQueue:
    """Leases of what is on a shelf, and the callers that wait for a place on it."""

    def __init__(self, shelf: Shelf, loader: Worker, lock: threading.Condition) -> None:
        self._shelf, self._loader, self._lock = shelf, loader, lock
        self._waiting: deque[Waiter] = deque()
        # Entries that cannot be leased, since the first waiter needs their places.
        self._leaving: set[Entry] = set()
        # How often a lease has been released.
        self._releases = 0
        # Whether the loader is going to look at the queue.
        self.is_awake = False

    # With the lock held, in any thread.

    def lease(self, entries: list[Entry]) -> Future[Lease]:
        """Leases entries, at once or when the loader has brought those that are absent."""
        distinct = list(dict.fromkeys(entries))
        waiter = Waiter(entries, distinct, Future())
        absent = sum(entry.slot is None for entry in distinct)
        self._shelf.counts.hits += len(distinct) - absent
        self._shelf.counts.misses += absent
        if self._is_ready(waiter):
            lease = self._grant(waiter)
            if lease is not None:
                waiter.future.set_result(lease)
            return waiter.future
        for entry in distinct:
            entry.waiters += 1
        self._waiting.append(waiter)
        waiter.future.add_done_callback(self._notice_cancelled)
        self.wake()
        return waiter.future

    def wake(self) -> None:
        """Has the loader look at the queue; needs no lock."""
        if not self.is_awake:
            self.is_awake = True
            self._loader.submit(self._serve)

    def _is_ready(self, waiter: Waiter) -> bool:
        return not self._shelf.is_moving and all(
            e.slot is not None and e not in self._leaving for e in waiter.distinct
        )

    def _grant(self, waiter: Waiter) -> Lease | None:
        """Makes the lease; None where the caller has cancelled it."""
        if not waiter.future.set_running_or_notify_cancel():
            return None
        for entry in waiter.distinct:
            entry.users += 1
            self._shelf.touch(entry)
        return Lease(waiter.entries, self._release)

    def _remove(self, waiter: Waiter) -> None:
        self._waiting.remove(waiter)
        for entry in waiter.distinct:
            entry.waiters -= 1
        self._lock.notify_all()

    def _reserve_places(self, entry: Entry, beside: Collection[Entry]) -> bool:
        """Reserves as many places in use as ``entry`` needs; False when none will become free."""
        pinned = {e for lease in self._shelf.pins.values() for e in lease.entries}
        others = [e for e in self._shelf.resident if e not in beside and e not in pinned]
        in_use = [e for e in others if e.users]
        self._leaving.intersection_update(self._shelf.resident)
        for other in in_use:
            leavers = [e for e in others if not e.users or e in self._leaving]
            # At least one more than have left: free pages may lie in pieces that are too small.
            if any(e.users for e in self._leaving) and self._shelf.has_room(entry, leavers):
                break
            self._leaving.add(other)
        return bool(in_use)

    # Without the lock, in any thread.

    def _release(self, lease: Lease) -> None:
        with self._lock:
            # Recorded with the lock held, so that of each stream the last event stays.
            events = self._shelf.device.record_events()
            for entry in dict.fromkeys(lease.entries):
                entry.users -= 1
                entry.events.update(events)
            self._releases += 1
            self._lock.notify_all()
            needed = self._leaving or not all(entry.known for entry in lease.entries)
        if needed:
            self.wake()

    def _notice_cancelled(self, future: Future[Lease]) -> None:
        if future.cancelled():
            self.wake()

    # Without the lock, in the loader alone.

    def settle(self, entry: Entry, image: Image) -> None:
        """Brings a new entry to the device where no other has to leave for it."""
        self._shelf.free_dropped()
        with self._lock:
            in_layout = self._shelf.device.layout is image.layout
            absent = in_layout and entry.known and entry.slot is None and not self._waiting
        if absent:
            self._shelf.place(entry, image, (), evict=False)

    def move(self, layout: Layout, slots: int, nbytes: int | None) -> None:
        """Exchanges the device, then serves the callers that have waited for it."""
        try:
            self._shelf.rebuild(layout, slots, nbytes)
        finally:
            self.wake()

    def _serve(self) -> None:
        """Frees what was dropped and serves the next waiter; other tasks of the loader are next."""
        self.is_awake = False
        self._shelf.free_dropped()
        if self._serve_next():
            self.wake()

    def _serve_next(self) -> bool:
        """Serves the first waiter; whether to go on, since it has come closer to its lease."""
        self._serve_ready()
        with self._lock:
            if not self._waiting:
                return False
            waiter, releases = self._waiting[0], self._releases
            entry = next((e for e in waiter.distinct if e.slot is None), None)
            if entry is None:
                self._end_turn()
                return True
        try:
            placed = self._shelf.place(entry, self._shelf.image(entry), waiter.distinct)
        except BaseException as error:
            self._fail(waiter, error)
            return True
        with self._lock:
            if placed:
                self._end_turn()
            if placed or self._releases != releases:
                return True
            if self._reserve_places(entry, waiter.distinct):
                return False
            pinned = list_some(set(self._shelf.pins)) or "nothing"
        names = list_some(e.name for e in waiter.distinct if e is not entry) or "nothing"
        reason = f"what is pinned ({pinned}) and runs beside it ({names}) leaves no room"
        if not self._shelf.device.can_hold(entry.ranks):
            reason = f"it is larger than the device's {self._shelf.device.nbytes} bytes of pages"
        self._fail(waiter, RuntimeError(f"{entry.name}: {reason}"))
        return True

    def _end_turn(self) -> None:
        """Frees what was reserved for the first waiter, and forgets the copy read for it."""
        self._leaving.clear()
        self._shelf.fresh = None

    def _serve_ready(self) -> None:
        """Grants leases whose adapters are all there, and forgets cancelled ones."""
        with self._lock:
            first = self._waiting[0] if self._waiting else None
            ready = [w for w in self._waiting if w.future.cancelled() or self._is_ready(w)]
            for waiter in ready:
                self._remove(waiter)
            leases = [(waiter, self._grant(waiter)) for waiter in ready]
            if first in ready:
                self._end_turn()
        # Without the lock: it may call back.
        for waiter, lease in leases:
            if lease is not None:
                waiter.future.set_result(lease)

    def _fail(self, waiter: Waiter, error: BaseException) -> None:
        with self._lock:
            self._end_turn()
            self._remove(waiter)
        if waiter.future.set_running_or_notify_cancel():
            waiter.future.set_exception(error)
