"""``Limits``: how many answers may run or wait, in all and for one key."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from fastlora.serving.http.refusals import Refused

# Weight of the last answer in the mean of their seconds.
_WEIGHT = 0.1


class Limits:
    """Counts answers that are under way; a request that would be too many is refused with 429.

    rows: how many run at a time, which tells how soon there is room again.
    """

    def __init__(self, under_way: int, per_key: int, rows: int) -> None:
        self._under_way, self._per_key, self._rows = under_way, per_key, rows
        self._counts: Counter[str] = Counter()
        self._seconds = 1.0

    @property
    def total(self) -> int:
        return self._counts.total()

    @contextmanager
    def enter(self, account: str, count: int) -> Iterator[None]:
        """Within, ``count`` answers of this account are under way; Refused (429) without room."""
        if self.total + count > self._under_way:
            raise self._refuse("the server has as many requests as it takes")
        if self._counts[account] + count > self._per_key:
            raise self._refuse("this key has as many requests under way as it may")
        self._counts[account] += count
        try:
            yield
        finally:
            self._counts[account] -= count
            if not self._counts[account]:
                del self._counts[account]

    def note_seconds(self, seconds: float) -> None:
        """Notes how long an answer took."""
        self._seconds += _WEIGHT * (seconds - self._seconds)

    def _refuse(self, why: str) -> Refused:
        rounds = max(self.total / self._rows, 1)
        wait = min(math.ceil(self._seconds * rounds / 2), 60)
        return Refused(429, None, why, {"Retry-After": str(max(wait, 1))})
