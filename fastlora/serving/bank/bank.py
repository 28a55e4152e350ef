"""``AdapterBank``: thousands of adapters known, tens of them in a device's memory for batches.

An adapter lies on disk; in the host's memory, as its pages will be; and, while it has a slot, in
pages of the device. A batch leases its adapters: until it releases the lease they stay as and where
they are, whatever is loaded, replaced or removed meanwhile.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

from fastlora.config import check_rank
from fastlora.config.listing import list_some
from fastlora.serving.bank.device import Device, Pages
from fastlora.serving.bank.entry import Entry, Read
from fastlora.serving.bank.layout import Image, Layout, check_factors, hash_factors
from fastlora.serving.bank.lease import Lease, give_up
from fastlora.serving.bank.queue import LeaseQueue
from fastlora.serving.bank.shelf import Shelf
from fastlora.serving.bank.stats import BankStats
from fastlora.serving.bank.worker import Worker


class AdapterBank:
    """Adapters for the layers of a layout, at most ``max_adapters`` of them on the device.

    device_bytes: of pages; None: enough for max_adapters of the highest rank in every layer.
    host_bytes: of copies in the host's memory; what exceeds it is read again when it is needed.

    ``MultiLoRAModel`` makes it and passes its methods on. All may be called from any thread. Raises
    TypeError or ValueError for sizes that are no whole numbers in range.
    """

    def __init__(
        self,
        layout: Layout,
        max_adapters: int,
        *,
        device_bytes: int | None = None,
        host_bytes: int = 4 << 30,
    ) -> None:
        check_rank("max_adapters", max_adapters)
        _check_bytes("host_bytes", host_bytes)
        if device_bytes is not None:
            _check_bytes("device_bytes", device_bytes)
        self.max_adapters, self.device_bytes = max_adapters, device_bytes
        self._begin(layout, host_bytes)

    def _begin(self, layout: Layout, host_bytes: int) -> None:
        self._entries: dict[str, Entry] = {}
        # Guards which leases use what; held for microseconds. The loader does what takes long.
        self._lock = threading.Condition(threading.Lock())
        device = Device(layout, self.max_adapters, self.device_bytes)
        self._shelf = Shelf(device, self.max_adapters, host_bytes, self._lock)
        self._loader = Worker("fastlora-adapters")
        self._queue = LeaseQueue(self._shelf, self._loader, self._lock)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the known adapters, in the order in which they came."""
        return tuple(self._entries)

    @property
    def layout(self) -> Layout:
        return self._shelf.device.layout

    def pages(self, layer: str) -> Pages:
        """Returns what the layer of this name reads of the adapters on the device."""
        return self._shelf.device.pages[layer]

    def digest(self, name: str) -> str:
        """Returns the SHA-256 of an adapter's tensors and scalings; ValueError if not known."""
        with self._lock:
            return self._find(name).digest

    def add(self, name: str, read: Read) -> None:
        """Makes an adapter known; under a name that is taken it replaces the old one, pin and all.

        read: returns {layer: Factors}, now and whenever the host's copy has made room for others.
        Batches that run keep what they have leased; leases from now on get the new one. Where it
        fits without taking another's place it is on the device when this returns. Raises what
        ``read`` raises, and ValueError, nothing changed, for what does not fit the layout, or an
        adapter larger than the device's pages, or than what other pinned ones leave a pinned one.
        """
        factors = read()
        layout = self.layout
        check_factors(factors, layout)
        ranks = {layer: f.lora_A.shape[0] for layer, f in factors.items()}
        if not self._shelf.device.can_hold(ranks):
            raise ValueError(
                f"device_bytes: {name!r} takes {layout.nbytes(ranks)} bytes in pages, which "
                f"{self._shelf.device.nbytes} bytes cannot hold"
            )
        entry, image = Entry(name, read, hash_factors(factors), ranks), layout.image(factors)
        pin: Lease | None = None
        with self._lock:
            moved = self._shelf.is_moving or self.layout is not layout
            if not moved:
                old = self._entries.get(name)
                if old is not None and old.digest == entry.digest:
                    old.read = read
                    return
                pin = self._set_entry(entry, image)
        if moved:
            # The model has been moved meanwhile: again, when the loader has exchanged the device.
            self._loader.wait_for(int)
            self.add(name, read)
            return
        if pin is not None and self._shelf.pins.get(name) is pin:
            pin.release()
            self.pin(name)
        self._loader.wait_for(self._queue.settle, entry, image)

    def remove(self, name: str, *, wait: bool = False, timeout: float | None = None) -> None:
        """Forgets an adapter and its pin. Its pages are zeroed and free when this returns.

        wait: whether to wait for batches that use it; from the call on no other can lease it.
        timeout: seconds to wait at most, for them and for the loader. Raises ValueError for an
        unknown name, RuntimeError, nothing changed, where it is in use and wait is false,
        TimeoutError when the time is over: then its pages are freed later, once it is idle.
        """
        end = math.inf if timeout is None else time.monotonic() + timeout
        with self._lock:
            entry = self._find(name)
            if not wait and entry.users + entry.waiters > (name in self._shelf.pins):
                raise RuntimeError(
                    f"adapter_name: {name!r} is in use; unload it with wait=True, or later"
                )
            del self._entries[name]
            self._shelf.drop(entry)
            pin = self._shelf.pins.pop(name, None)
        if pin is not None:
            pin.release()
        self._queue.wake()
        with self._lock:
            seconds = None if timeout is None else max(end - time.monotonic(), 0)
            if not self._lock.wait_for(lambda: entry.is_idle, seconds):
                raise TimeoutError(f"adapter_name: {name!r} is still in use after {timeout} s")
        seconds = None if timeout is None else max(end - time.monotonic(), 0)
        self._loader.wait_for(self._shelf.free_dropped, timeout=seconds)

    def pin(self, name: str) -> None:
        """Brings an adapter to the device, where it stays until ``unpin`` or ``remove``.

        Raises as ``lease`` does, and as its future: then it is not pinned.
        """
        while True:
            try:
                lease = self.borrow([name])
            except BaseException:
                self._shelf.pins.pop(name, None)
                raise
            with self._lock:
                entry, pin = lease.entries[0], self._shelf.pins.get(name)
                pinned = pin is not None and pin.entries[0] is entry
                if entry.known and not pinned:
                    self._shelf.pins[name] = lease
                    break
            # Pinned already, or replaced while it was read: then the new one is pinned.
            lease.release()
            if pinned:
                break
        self._queue.wake()

    def unpin(self, name: str) -> None:
        """Lets a pinned adapter make room for others again; ValueError when it is not pinned."""
        with self._lock:
            pin = self._shelf.pins.pop(name, None)
        if pin is None:
            raise ValueError(f"adapter_name: {name!r} is not pinned")
        pin.release()

    def borrow(self, names: Sequence[str]) -> Lease:
        """Waits for a lease of the adapters; raises what ``lease`` and its future raise."""
        future = self.lease(names)
        try:
            return future.result()
        except BaseException:
            # Interrupted, perhaps: then nothing else would release it.
            give_up(future)
            raise

    def lease(self, names: Sequence[str]) -> Future[Lease]:
        """Leases adapters, in any number; their slots are in the lease, in the order of names.

        The future is done already where all are on the device; otherwise when the loader has
        brought them there, first come first served, in the places of the least recently used that
        are idle. Where none is idle, some cannot be leased again before they have made room. The
        future fails, for this caller alone, with what reading raised (files gone, corrupt, or other
        than were loaded), or RuntimeError where pinned adapters leave no room, or those asked for
        do not fit beside each other. A future that is cancelled leases nothing.

        Raises ValueError for an unknown name, or more different ones than max_adapters.
        """
        if isinstance(names, str):
            raise TypeError(f"adapter_names: expected a list of names, got {names!r}")
        with self._lock:
            entries = [self._find(name, "adapter_names") for name in names]
            distinct = len(set(names))
            if distinct > self.max_adapters:
                raise ValueError(
                    f"adapter_names: expected at most max_adapters={self.max_adapters} different "
                    f"ones, got {distinct}"
                )
            return self._queue.lease(entries)

    def stats(self) -> BankStats:
        """Returns the counts since the bank was made, and what it holds now."""
        with self._lock:
            device = self._shelf.device
            return BankStats(
                **vars(self._shelf.counts)
                | {
                    "known": len(self._entries),
                    "resident": len(self._shelf.resident),
                    "copied": len(self._shelf.copied),
                    "leases": sum(entry.users for entry in self._shelf.resident),
                    "device_bytes": device.nbytes,
                    "device_bytes_used": device.nbytes_taken,
                    "host_bytes_used": self._shelf.host_bytes_used,
                }
            )

    def rebuild(self, layout: Layout) -> None:
        """Begins anew with the same layers elsewhere or in another dtype; all stays known.

        Raises RuntimeError, nothing changed, while adapters are leased.
        """
        self._loader.wait_for(self._queue.move, layout, self.max_adapters, self.device_bytes)

    def __getstate__(self) -> dict[str, Any]:
        # A copy knows the same adapters, with an empty device and no leases.
        with self._lock:
            entries = list(self._entries.values())
            return {
                "max_adapters": self.max_adapters,
                "device_bytes": self.device_bytes,
                "host_bytes": self._shelf.host_bytes,
                "layout": self._shelf.device.layout,
                "entries": [(e.name, e.read, e.digest, e.ranks, e.image) for e in entries],
            }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.max_adapters, self.device_bytes = state["max_adapters"], state["device_bytes"]
        self._begin(state["layout"], state["host_bytes"])
        for name, read, digest, ranks, image in state["entries"]:
            entry = self._entries[name] = Entry(name, read, digest, ranks)
            if image is not None:
                self._shelf.keep_copy(entry, image)

    def _set_entry(self, entry: Entry, image: Image) -> Lease | None:
        """Makes an entry what its name means; returns the name's pin. With the lock held."""
        name, pins = entry.name, self._shelf.pins
        if name in pins:
            ranks = {e.name: e.ranks for pin in pins.values() for e in pin.entries}
            if not self._shelf.device.can_hold(*(ranks | {name: entry.ranks}).values()):
                raise ValueError(
                    f"device_bytes: {name!r} is pinned, and would not fit beside others that are"
                )
        if name in self._entries:
            self._shelf.drop(self._entries[name])
        self._entries[name] = entry
        self._shelf.keep_copy(entry, image)
        return pins.get(name)

    def _find(self, name: object, argument: str = "adapter_name") -> Entry:
        if not isinstance(name, str) or name not in self._entries:
            loaded = list_some(self._entries, 8) or "none"
            raise ValueError(f"{argument}: no adapter {name!r} is loaded (loaded: {loaded})")
        return self._entries[name]


def _check_bytes(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if value < 0:
        raise ValueError(f"{name}: expected a number of bytes, got {value}")
