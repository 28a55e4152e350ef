"""``Stream``: a running request's tokens, as they come."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator

from fastlora.serving.engine.request import Event, FinishReason, Request


class Channel:
    """Tokens of a request that wait for readers: no more than its max_new_tokens."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.end: Event | None = None
        self.news = threading.Condition()

    def put(self, event: Event) -> None:
        with self.news:
            if event.token is not None:
                self.tokens.append(event.token)
            if event.finish_reason is not None:
                self.end = event
            self.news.notify_all()


class Stream:
    """A request's tokens, from ``Engine.submit``; any thread can read them, and more than once.

    Iterating yields token ids as they come, and ends when the request has ended for whatever
    reason; only an error is raised. A stream that is no longer referenced cancels its request.
    """

    def __init__(
        self, engine: object, request: Request, channel: Channel, cancel: Callable[[], None]
    ) -> None:
        self.request = request
        self._channel = channel
        # An engine lives as long as its streams.
        self._engine = engine
        self._cancel = cancel
        weakref.finalize(self, cancel).atexit = False

    def __iter__(self) -> Iterator[int]:
        read, end = 0, None
        while end is None:
            with self._channel.news:
                while self._channel.end is None and len(self._channel.tokens) == read:
                    self._channel.news.wait()
                tokens, end = self._channel.tokens[read:], self._channel.end
            read += len(tokens)
            yield from tokens
        _raise(end)

    @property
    def tokens(self) -> list[int]:
        """The tokens that have come so far."""
        with self._channel.news:
            return list(self._channel.tokens)

    @property
    def finish_reason(self) -> FinishReason | None:
        """None while it goes on; else "eos", "length", "cancelled", "timeout" or "error"."""
        end = self._channel.end
        return None if end is None else end.finish_reason

    @property
    def error(self) -> BaseException | None:
        """The error that the request failed with."""
        end = self._channel.end
        return None if end is None else end.error

    def result(self, timeout: float | None = None) -> list[int]:
        """Waits for the end and returns all tokens; ``finish_reason`` says why it ended.

        Raises what the request failed with, TimeoutError when it goes on after ``timeout`` seconds.
        """
        channel = self._channel
        with channel.news:
            if not channel.news.wait_for(lambda: channel.end is not None, timeout):
                raise TimeoutError(f"timeout: the request goes on after {timeout} s")
        assert channel.end is not None
        _raise(channel.end)
        return list(channel.tokens)

    def cancel(self) -> None:
        """Ends the request after the step that runs; its tokens stay. Later it does nothing."""
        self._cancel()


def _raise(end: Event) -> None:
    if end.error is not None:
        raise end.error
