"""What a bank knows of an adapter, what it lends, and what it counts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import NamedTuple

from fastlora.serving.bank.device import Passed, Places
from fastlora.serving.bank.layout import Factors, Image

Read = Callable[[], Mapping[str, Factors]]


@dataclass(eq=False)
class Entry:
    """One content of an adapter: another content is another entry, be its name the same.

    read, digest, ranks: where it comes from, what it is, of each layer. image: the host's copy,
    while there is one. slot, places: on the device. users, wanted: leases that hold it, and callers
    that wait for it. passed: what its users have queued on a GPU, each stream's last. known: to the
    bank; one that is not any more keeps its place until it is idle.
    """

    name: str
    read: Read
    digest: str
    ranks: dict[str, int]
    image: Image | None = None
    slot: int | None = None
    places: Places = field(default_factory=dict)
    users: int = 0
    wanted: int = 0
    passed: Passed = field(default_factory=dict)
    known: bool = True

    @property
    def idle(self) -> bool:
        return not self.users + self.wanted


class Lease:
    """Adapters that a batch has borrowed: they stay in ``slots``, as they are, until ``release``.

    slots: one an adapter that was asked for, in that order. Release it in the thread that ran the
    batch, on its stream, when its last forward has been called; more often than once does nothing.
    As a context manager it does so itself.
    """

    def __init__(self, entries: Sequence[Entry], give_back: Callable[[Lease], None]) -> None:
        self.entries = tuple(entries)
        self.slots = tuple(-1 if e.slot is None else e.slot for e in entries)
        self._give_back: Callable[[Lease], None] | None = give_back

    def release(self) -> None:
        give_back, self._give_back = self._give_back, None
        if give_back is not None:
            give_back(self)

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def let_go(future: Future[Lease]) -> None:
    """Lets go of a lease that nobody waits for any more, be it there or still to come."""
    if not future.cancel():
        future.add_done_callback(_release)


def _release(future: Future[Lease]) -> None:
    if not future.cancelled() and future.exception() is None:
        future.result().release()


class Waiter(NamedTuple):
    """A caller of ``lease``: what it asked for, each once, and what it was promised."""

    entries: list[Entry]
    different: list[Entry]
    future: Future[Lease]


@dataclass
class BankStats:
    """What a bank has done, and what it holds now.

    hits, misses: adapters asked for that were on the device, or not. loads: copies to the device.
    reads: of them, those for which files were read again. evictions: adapters that made room.
    known, resident, copied: adapters that it knows, that are on the device, that are in the host's
    memory. leases: of adapters now, pins included. device_bytes, device_bytes_used,
    host_bytes_used: of pages, of those taken, of host copies.
    """

    hits: int = 0
    misses: int = 0
    loads: int = 0
    reads: int = 0
    evictions: int = 0
    known: int = 0
    resident: int = 0
    copied: int = 0
    leases: int = 0
    device_bytes: int = 0
    device_bytes_used: int = 0
    host_bytes_used: int = 0
