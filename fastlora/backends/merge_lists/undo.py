"""All or none: steps that are taken back, the last first, when a later one fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from fastlora.backends import interrupts
from fastlora.backends.merge_lists import errors


class Undo:
    """What takes back the steps that have been done so far."""

    def __init__(self) -> None:
        self._calls: list[tuple[Callable[..., Any], tuple[Any, ...]]] = []

    def push(self, function: Callable[..., Any], *args: Any) -> None:
        """Notes that ``function(*args)`` takes back the step before it."""
        self._calls.append((function, args))

    def take_back(self) -> list[Exception]:
        """Takes back every step, whatever others do; returns the errors of those that failed."""
        failures = []
        for function, args in reversed(self._calls):
            try:
                function(*args)
            except Exception as failure:  # noqa: PERF203
                failures.append(failure)
        return failures


@contextmanager
def all_or_none() -> Iterator[Undo]:
    """Takes back what was pushed when what is inside fails; Ctrl-C waits until it can be.

    RuntimeError, with the cause, where a step could not be taken back.
    """
    undo = Undo()
    with interrupts.deferred():
        try:
            yield undo
            interrupts.check()
        except BaseException as error:
            failures = undo.take_back()
            if failures:
                failed = RuntimeError(f"{error}; and not all could be undone: {failures[0]}")
                raise errors.set_index(failed, errors.index_of(error)) from error
            raise
