"""``Lease``: adapters that stay on the device, as they are, while a batch uses them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future

from fastlora.serving.bank.entry import Entry


class Lease:
    """Adapters that a batch uses: they stay in ``slots``, as they are, until ``release``.

    slots: one for each adapter that was asked for, in that order. Release it in the thread that ran
    the batch, on its stream, once its last forward has been called; a second release does nothing.
    As a context manager it releases itself.
    """

    def __init__(self, entries: Sequence[Entry], on_release: Callable[[Lease], None]) -> None:
        self.entries = tuple(entries)
        self.slots = tuple(-1 if e.slot is None else e.slot for e in entries)
        self._on_release: Callable[[Lease], None] | None = on_release

    def release(self) -> None:
        on_release, self._on_release = self._on_release, None
        if on_release is not None:
            on_release(self)

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def give_up(future: Future[Lease]) -> None:
    """Cancels a lease that nobody waits for any more, or releases it if it is there."""
    if not future.cancel():
        future.add_done_callback(_release)


def _release(future: Future[Lease]) -> None:
    if not future.cancelled() and future.exception() is None:
        future.result().release()
