"""``Choice``: one of an answer's texts as it grows, from an engine's events."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from fastlora.serving.engine.request import Event
from fastlora.serving.http.refusals import Refused, refuse_failure
from fastlora.serving.http.text import Stops, Text


class Piece(NamedTuple):
    """What a choice has more of: text, tokens (events), and why it ended where it did."""

    text: str
    events: list[Event]
    finish: str | None


class Choice:
    """A text with its stop strings. ends: tokens that end it, which are no part of it."""

    def __init__(
        self, decode: Callable[[list[int]], str], stops: Sequence[str], ends: frozenset[int]
    ) -> None:
        self._text, self._stops, self._ends = Text(decode), Stops(stops), ends
        self.finish: str | None = None
        self.tokens = 0

    def add(self, events: Sequence[Event]) -> Piece:
        """Takes the next events; Refused where the last one is an error or came too early."""
        shown: list[Event] = []
        text = ""
        for event in events:
            if self.finish is not None:
                break
            if event.finish_reason in ("error", "timeout", "cancelled"):
                raise _explain(event)
            is_end = event.finish_reason == "eos" or event.token in self._ends
            ids = [] if is_end or event.token is None else [event.token]
            if ids:
                shown.append(event)
            last = event.finish_reason is not None
            piece, stopped = self._stops.add(self._text.add(ids, last), last)
            text += piece
            if stopped:
                self.finish = "stop"
            elif last:
                self.finish = "stop" if is_end else "length"
        self.tokens += len(shown)
        return Piece(text, shown, self.finish)


def _explain(event: Event) -> Refused:
    """Makes the refusal for a request that ended without its last token."""
    if event.finish_reason == "timeout":
        return Refused(504, None, f"the answer took longer than {event.request.timeout:g} s")
    if event.finish_reason == "cancelled":
        return Refused(503, None, "the server is stopping")
    # A forward's failure is the server's own affair; an adapter's concerns who asked for it.
    if event.error is None or event.error.__cause__ is not None:
        return refuse_failure()
    return Refused(500, "model", f"the adapter failed: {event.error}")
