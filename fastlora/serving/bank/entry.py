"""What a bank knows of one adapter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from fastlora.serving.bank.device import Blocks, Events
from fastlora.serving.bank.layout import Factors, Image

Read = Callable[[], Mapping[str, Factors]]


@dataclass(eq=False)
class Entry:
    """One version of an adapter: when its name is loaded again with other numbers, that is another.

    read, digest: where its numbers come from and their hash. ranks: of each layer. image: the
    host's copy, while there is one. slot, blocks: its place on the device, while it has one. users:
    leases that hold it. waiters: callers that wait for it. events: the work that its users have
    queued on a GPU, the last of each stream. known: whether the bank can still lease it; if not, it
    keeps its place until it is idle.
    """

    name: str
    read: Read
    digest: str
    ranks: dict[str, int]
    image: Image | None = None
    slot: int | None = None
    blocks: Blocks = field(default_factory=dict)
    users: int = 0
    waiters: int = 0
    events: Events = field(default_factory=dict)
    known: bool = True

    @property
    def is_idle(self) -> bool:
        return not self.users + self.waiters
