"""``AdapterBank``: thousands of adapters known, tens of them in a device's memory, lent to batches.

An adapter lies on disk; in the host's memory, as its pages will be; and, while it has a slot, in
pages of the device. Batches borrow adapters by ``lease``: what is lent stays as and where it is
until it is released, whatever is loaded, replaced or dropped meanwhile.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

from fastlora.config import check_rank
from fastlora.config.listing import list_some
from fastlora.serving.bank.device import Device, Pages
from fastlora.serving.bank.entry import BankStats, Entry, Lease, Read, let_go
from fastlora.serving.bank.layout import Layout, check_factors, digest
from fastlora.serving.bank.queue import Residency


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
        device = Device(layout, self.max_adapters, self.device_bytes)
        self._all = Residency(device, self.max_adapters, host_bytes)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the adapters known, in the order in which they came."""
        return tuple(self._entries)

    @property
    def layout(self) -> Layout:
        return self._all.device.layout

    def pages(self, layer: str) -> Pages:
        """What the layer of this name reads of the adapters on the device."""
        return self._all.device.pages[layer]

    def digest(self, name: str) -> str:
        """SHA-256 of the adapter's tensors and scalings; ValueError when it is not known."""
        with self._all.lock:
            return self._entry(name).digest

    def add(self, name: str, read: Read) -> None:
        """Makes an adapter known; under a name that is taken it replaces the old one, pin and all.

        read: gives {layer: Factors}, now and whenever the host's copy has made room for others.
        Batches that run keep what they borrowed; who borrows after this returns gets the new one.
        Where it fits without taking another's place it is on the device then. Raises what ``read``
        raises, and ValueError, nothing changed, for what does not fit the layout, or an adapter
        larger than the device's pages, or than what other pinned ones leave a pinned one.
        """
        factors = read()
        layout = self.layout
        check_factors(factors, layout)
        ranks = {layer: f.lora_A.shape[0] for layer, f in factors.items()}
        if not self._all.device.holds(ranks):
            raise ValueError(
                f"device_bytes: {name!r} takes {layout.nbytes(ranks)} bytes in pages, which "
                f"{self._all.device.nbytes} bytes cannot hold"
            )
        entry, image = Entry(name, read, digest(factors), ranks), layout.image(factors)
        with self._all.lock:
            moved, old = self._all.moving or self.layout is not layout, self._entries.get(name)
            if not moved and old is not None and old.digest == entry.digest:
                old.read = read
                return
            pins = {e.name: e.ranks for pin in self._all.pins.values() for e in pin.entries}
            pinned = name in pins
            if (
                pinned
                and not moved
                and not self._all.device.holds(*(pins | {name: ranks}).values())
            ):
                raise ValueError(
                    f"device_bytes: {name!r} is pinned, and would not fit beside others that are"
                )
            if not moved:
                if old is not None:
                    self._all.drop(old)
                self._entries[name] = entry
                self._all.keep_copy(entry, image)
        if moved:
            # The model has gone elsewhere meanwhile; all is there when the loader is done.
            self._all.loader.wait_for(int)
            self.add(name, read)
            return
        if pinned:
            self._all.pins[name].release()
            self.pin(name)
        self._all.loader.wait_for(self._all.settle, entry, image)

    def remove(self, name: str, *, wait: bool = False, timeout: float | None = None) -> None:
        """Forgets an adapter and its pin. Its pages are zeroed and free when this returns.

        wait: whether to wait for batches that use it; from the call on nobody else can borrow it.
        timeout: seconds to wait at most, for them and for the loader. Raises ValueError for an
        unknown name, RuntimeError, nothing changed, where it is in use and wait is false,
        TimeoutError when the time is over: its pages are then free as soon as may be.
        """
        end = math.inf if timeout is None else time.monotonic() + timeout
        with self._all.lock:
            entry = self._entry(name)
            if not wait and entry.users + entry.wanted > (name in self._all.pins):
                raise RuntimeError(
                    f"adapter_name: {name!r} is in use; unload it with wait=True, or later"
                )
            del self._entries[name]
            self._all.drop(entry)
            pin = self._all.pins.pop(name, None)
        if pin is not None:
            pin.release()
        self._all.poke()
        with self._all.lock:
            left = None if timeout is None else max(end - time.monotonic(), 0)
            if not self._all.lock.wait_for(lambda: entry.idle, left):
                raise TimeoutError(f"adapter_name: {name!r} is still in use after {timeout} s")
        left = None if timeout is None else max(end - time.monotonic(), 0)
        self._all.loader.wait_for(self._all.free_dropped, timeout=left)

    def pin(self, name: str) -> None:
        """Brings an adapter to the device, where it stays until ``unpin`` or ``remove``.

        Raises as ``lease`` does, and as its future: then it is not pinned.
        """
        while True:
            try:
                lease = self.borrow([name])
            except BaseException:
                self._all.pins.pop(name, None)
                raise
            with self._all.lock:
                entry, pin = lease.entries[0], self._all.pins.get(name)
                there = pin is not None and pin.entries[0] is entry
                if entry.known and not there:
                    self._all.pins[name] = lease
                    break
            # Pinned already, or exchanged while it was brought: then the new one is.
            lease.release()
            if there:
                break
        self._all.poke()

    def unpin(self, name: str) -> None:
        """Lets a pinned adapter make room for others again; ValueError when it is not pinned."""
        with self._all.lock:
            pin = self._all.pins.pop(name, None)
        if pin is None:
            raise ValueError(f"adapter_name: {name!r} is not pinned")
        pin.release()

    def borrow(self, names: Sequence[str]) -> Lease:
        """What ``lease`` promises, when it is there. Raises what it and its future raise."""
        future = self.lease(names)
        try:
            return future.result()
        except BaseException:
            # Interrupted, perhaps: then nobody would give it back.
            let_go(future)
            raise

    def lease(self, names: Sequence[str]) -> Future[Lease]:
        """Borrows adapters, in any number; their slots are in the lease, in the order of names.

        The future is done already where all are on the device; otherwise when the loader has
        brought them there, first come first served, in the places of the least recently used that
        nobody has borrowed; where all are borrowed, some are not lent on until it has got a place.
        It fails, for this caller alone, with what reading raised (files gone, corrupt, or other
        than were loaded), or RuntimeError where what is pinned leaves no room, or what is asked for
        none for each other. A future that is cancelled borrows nothing.

        Raises ValueError for an unknown name, or more different ones than max_adapters.
        """
        if isinstance(names, str):
            raise TypeError(f"adapter_names: expected a list of names, got {names!r}")
        with self._all.lock:
            entries = [self._entry(name, "adapter_names") for name in names]
            different = len(set(names))
            if different > self.max_adapters:
                raise ValueError(
                    f"adapter_names: expected at most max_adapters={self.max_adapters} different "
                    f"ones, got {different}"
                )
            return self._all.lend(entries)

    def stats(self) -> BankStats:
        """Counts since the bank was made, and what it holds now."""
        with self._all.lock:
            device = self._all.device
            return BankStats(
                **vars(self._all.counts)
                | {
                    "known": len(self._entries),
                    "resident": len(self._all.resident),
                    "copied": len(self._all.copied),
                    "leases": sum(entry.users for entry in self._all.resident),
                    "device_bytes": device.nbytes,
                    "device_bytes_used": device.nbytes_taken,
                    "host_bytes_used": self._all.host_bytes_used,
                }
            )

    def rebuild(self, layout: Layout) -> None:
        """Begins anew with the same layers elsewhere or in another dtype; nothing is forgotten.

        Raises RuntimeError, nothing changed, while adapters are borrowed.
        """
        self._all.loader.wait_for(self._all.move, layout, self.max_adapters, self.device_bytes)

    def __getstate__(self) -> dict[str, Any]:
        # A copy knows the same adapters, lends none, and has an empty device of its own.
        with self._all.lock:
            entries = list(self._entries.values())
            return {
                "max_adapters": self.max_adapters,
                "device_bytes": self.device_bytes,
                "host_bytes": self._all.host_bytes,
                "layout": self._all.device.layout,
                "entries": [(e.name, e.read, e.digest, e.ranks, e.image) for e in entries],
            }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.max_adapters, self.device_bytes = state["max_adapters"], state["device_bytes"]
        self._begin(state["layout"], state["host_bytes"])
        for values in state["entries"]:
            *own, image = values
            entry = self._entries[own[0]] = Entry(*own)
            if image is not None:
                self._all.keep_copy(entry, image)

    def _entry(self, name: object, argument: str = "adapter_name") -> Entry:
        if not isinstance(name, str) or name not in self._entries:
            loaded = list_some(self._entries, 8) or "none"
            raise ValueError(f"{argument}: no adapter {name!r} is loaded (loaded: {loaded})")
        return self._entries[name]


def _check_bytes(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if value < 0:
        raise ValueError(f"{name}: expected a number of bytes, got {value}")
