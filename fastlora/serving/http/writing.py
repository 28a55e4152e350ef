"""Requests on their way into an engine, and its events on their way to the event loop.

The engine's thread hands over all events of a step together: one wake-up of the loop a step,
however many streams there are.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from fastlora.serving.engine.engine import Engine
from fastlora.serving.engine.request import Event, Request

# Which of an answer's requests, by number, and what happened to it.
Numbered = tuple[int, Event]


class Writing:
    """Requests of one answer that an engine writes; used in the event loop alone."""

    def __init__(self, count: int) -> None:
        self.loop = asyncio.get_running_loop()
        self.running = count
        self._cancels: list[Callable[[], None]] = []
        self._events: list[Numbered] = []
        self._waiter: asyncio.Future[None] | None = None

    async def take(self) -> list[Numbered]:
        """Waits for events and returns all there are, in their order."""
        if not self._events:
            self._waiter = self.loop.create_future()
            await self._waiter
        events, self._events = self._events, []
        return events

    def cancel(self, number: int) -> None:
        """Ends one of the requests after the step that runs."""
        self._cancels[number]()

    def close(self) -> None:
        """Ends those that have not ended."""
        if self.running:
            for cancel in self._cancels:
                cancel()

    def put(self, number: int, event: Event) -> None:
        self._events.append((number, event))
        self.running -= event.finish_reason is not None
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Outbox:
    """Events of a step: put there in the engine's thread, and sent at the end of its turn."""

    def __init__(self) -> None:
        self._events: list[tuple[Writing, int, Event]] = []

    def put(self, writing: Writing, number: int, event: Event) -> None:
        self._events.append((writing, number, event))

    def send(self) -> None:
        """Hands over what has been put, with one wake-up of each event loop."""
        events, self._events = self._events, []
        for loop in {writing.loop for writing, _, _ in events}:
            mine = [event for event in events if event[0].loop is loop]
            try:
                loop.call_soon_threadsafe(_deliver, mine)
            except RuntimeError:  # the loop has been closed: nobody waits any more
                continue


class Writer:
    """An engine's requests, from the event loop."""

    def __init__(self, engine: Engine, outbox: Outbox) -> None:
        self.engine, self._outbox = engine, outbox

    def write(self, requests: Sequence[Request]) -> Writing:
        """Queues an answer's requests; raises as ``Engine.send``, with none of them queued."""
        writing, put = Writing(len(requests)), self._outbox.put
        try:
            for number, request in enumerate(requests):
                emit = _number(put, writing, number)
                writing._cancels.append(self.engine.send(request, emit))
        except BaseException:
            writing.close()
            raise
        return writing


def _number(
    put: Callable[[Writing, int, Event], None], writing: Writing, number: int
) -> Callable[[Event], None]:
    return lambda event: put(writing, number, event)


def _deliver(events: list[tuple[Writing, int, Event]]) -> None:
    for writing, number, event in events:
        writing.put(number, event)
