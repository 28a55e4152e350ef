"""A record of what adapter names meant while threads change and use them."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Generic, TypeVar

Content = TypeVar("Content")


class History(Generic[Content]):
    """What each name has meant: a batch may see what it meant at any time while it ran."""

    def __init__(self, names: Sequence[str]) -> None:
        self.lock = threading.Lock()
        self.meant: dict[str, list[Content | None]] = {name: [None] for name in names}
        self.settled = dict.fromkeys(names, 0)
        self.turn = {name: threading.Lock() for name in names}

    @contextmanager
    def changing(self, name: str, to: Content | None) -> Iterator[None]:
        """Within, the name may mean the one or the other; afterwards ``to``, unless this raises."""
        with self.turn[name]:
            with self.lock:
                before = self.meant[name][-1]
                self.meant[name].append(to)
            try:
                yield
            except BaseException:
                with self.lock:
                    self.meant[name].append(before)
                raise
            finally:
                with self.lock:
                    self.settled[name] = len(self.meant[name]) - 1

    def now(self) -> dict[str, int]:
        with self.lock:
            return dict(self.settled)

    def since(self, then: dict[str, int], name: str) -> list[Content | None]:
        with self.lock:
            return self.meant[name][then[name] :]


def reraise_other_errors(error: Exception, *says: str) -> None:
    """Another error than these is the test's."""
    if not any(what in str(error) for what in says):
        raise error
