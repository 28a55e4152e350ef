"""``Answer``: what is written for one request, whole as JSON or in pieces as server-sent events."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager
from typing import Any

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from fastlora.serving.http.choices import Choice, Piece
from fastlora.serving.http.formats import Format, count_usage, make_head
from fastlora.serving.http.metrics import Metrics
from fastlora.serving.http.refusals import Refused, refuse_failure
from fastlora.serving.http.writing import Writing

_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),
]
# Seconds that sending may take longer than writing may.
_SENDING = 30.0


class Answer(Response):
    """Sends an answer while it is written; a client that leaves ends its requests at once.

    writing: what an engine writes, a choice each. room: held until the answer has ended. seconds:
    after which the answer is broken off even where the client does not read. log: takes an error of
    ours.
    """

    def __init__(
        self,
        writing: Writing,
        choices: list[Choice],
        form: Format,
        *,
        model: str,
        prompt_tokens: int,
        stream: bool,
        include_usage: bool,
        seconds: float,
        room: AbstractContextManager[None],
        metrics: Metrics,
        on_end: Callable[[float], None],
        log: Callable[[BaseException], None],
    ) -> None:
        self.status_code, self.background = 200, None
        self._writing, self._choices, self._form = writing, choices, form
        self._head = make_head(form, model, piece=stream)
        self._prompt_tokens, self._stream = prompt_tokens, stream
        self._include_usage, self._seconds, self._room = include_usage, seconds, room
        self._metrics, self._on_end, self._log = metrics, on_end, log
        self._began = time.monotonic()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        work = self._send_events(send) if self._stream else self._send_whole(scope, receive, send)
        tasks = [asyncio.ensure_future(work), asyncio.ensure_future(_wait_for_leaving(receive))]
        try:
            seconds = self._seconds + _SENDING
            await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._writing.close()
            for task in tasks:
                task.cancel()
            ends = await asyncio.gather(*tasks, return_exceptions=True)
            self._room.__exit__(None, None, None)
            self._note_end()
        if isinstance(ends[0], Exception):
            self._log(ends[0])

    async def _send_whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        whole = [Piece("", [], None) for _ in self._choices]
        try:
            async for index, piece in self._pieces():
                text, events = whole[index].text + piece.text, [*whole[index].events, *piece.events]
                whole[index] = Piece(text, events, piece.finish)
        except Refused as refused:
            await refused.respond()(scope, receive, send)
            return
        choices = [self._form.make_choice(index, piece) for index, piece in enumerate(whole)]
        body = self._head | {"choices": choices, "usage": self._count_usage()}
        await JSONResponse(body)(scope, receive, send)

    async def _send_events(self, send: Send) -> None:
        """Sends pieces as they come. An error ends them, without ``[DONE]``."""
        await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
        begins = [self._form.begin(index) for index in range(len(self._choices))]
        await _send_data(send, *(self._make_event([begin]) for begin in begins if begin))
        end = "[DONE]"
        try:
            while any(choice.finish is None for choice in self._choices):
                pieces = [
                    self._make_event([self._form.make_piece(index, piece)])
                    for index, piece in await self._take()
                    if piece.text or piece.events or piece.finish
                ]
                if pieces:
                    await _send_data(send, *pieces)
            if self._include_usage:
                await _send_data(send, self._make_event([], self._count_usage()))
        except Refused as refused:
            end = json.dumps(refused.describe())
        except Exception as error:
            self._log(error)
            end = json.dumps(refuse_failure().describe())
        await _send_data(send, end)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        while any(choice.finish is None for choice in self._choices):
            for numbered in await self._take():
                yield numbered

    async def _take(self) -> list[tuple[int, Piece]]:
        """Waits for events and returns what they add to each choice."""
        events: dict[int, list[Any]] = {}
        for index, event in await self._writing.take():
            events.setdefault(index, []).append(event)
        if not any(choice.tokens for choice in self._choices):
            self._metrics.first_token.observe(time.monotonic() - self._began)
        pieces = []
        for index, news in events.items():
            choice = self._choices[index]
            if choice.finish is not None:
                continue
            pieces.append((index, choice.add(news)))
            if choice.finish is not None and news[-1].finish_reason is None:
                self._writing.cancel(index)  # a stop string came
        return pieces

    def _make_event(self, choices: list[Any], usage: dict[str, int] | None = None) -> str:
        body = self._head | {"choices": choices}
        if self._include_usage:
            body["usage"] = usage
        return json.dumps(body, separators=(",", ":"))

    def _count_usage(self) -> dict[str, int]:
        return count_usage(self._prompt_tokens, sum(choice.tokens for choice in self._choices))

    def _note_end(self) -> None:
        seconds = time.monotonic() - self._began
        self._metrics.seconds.observe(seconds)
        self._metrics.written_tokens.inc(sum(choice.tokens for choice in self._choices))
        self._on_end(seconds)


async def _send_data(send: Send, *lines: str) -> None:
    body = "".join(f"data: {line}\n\n" for line in lines).encode()
    await send({"type": "http.response.body", "body": body, "more_body": True})


async def _wait_for_leaving(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
