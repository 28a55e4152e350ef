"""``Gate``: what every request passes first: its Host header, an id of ours, its body's size."""

from __future__ import annotations

import asyncio
import logging
import traceback
import uuid
from collections.abc import Callable

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastlora.serving.http.refusals import Refused, refuse_failure
from fastlora.serving.http.settings import Settings

logger = logging.getLogger("fastlora.serve")


class Gate:
    """Refuses requests for other hosts, answers for errors of ours, and counts responses.

    count: takes each one's status.
    """

    def __init__(self, app: ASGIApp, settings: Settings, count: Callable[[int], None]) -> None:
        self._app, self._hosts, self._count = app, settings.hosts, count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            return
        identity = uuid.uuid4().hex
        started = False

        async def send_counted(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                self._count(message["status"])
                MutableHeaders(scope=message)["X-Request-Id"] = identity
            await send(message)

        hosts = Headers(scope=scope).getlist("host")
        if len(hosts) != 1 or _strip_port(hosts[0]) not in self._hosts:
            why = "expected this server's name; others are added with --host-name"
            await Refused(421, "Host", why).respond()(scope, receive, send_counted)
            return
        try:
            await self._app(scope, receive, send_counted)
        except Exception as error:
            # Not raised on: servers log an error's words, which may have a prompt in them.
            log_failure(error)
            if not started:
                await refuse_failure().respond()(scope, receive, send_counted)


def log_failure(error: BaseException) -> None:
    """Logs where an error of ours came from, without its words."""
    frames = reversed(traceback.extract_tb(error.__traceback__))
    where = " <- ".join(f"{frame.name}:{frame.lineno}" for frame in frames)
    logger.error("a request failed: %s at %s", type(error).__name__, where or "an unknown place")


async def read_body(request: Request, settings: Settings) -> bytes:
    """Reads a JSON body, no more of it than is allowed; Refused for others."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # A page of another site can send other types without asking first.
        raise Refused(415, "Content-Type", "expected application/json")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > settings.body_bytes:
        raise _refuse_long(settings)
    try:
        return await asyncio.wait_for(_read(request, settings), settings.body_seconds)
    except (asyncio.TimeoutError, TimeoutError):
        raise Refused(
            408, None, f"expected the whole body within {settings.body_seconds:g} s"
        ) from None
    except ClientDisconnect:
        raise Refused(400, None, "the client has left") from None


async def _read(request: Request, settings: Settings) -> bytes:
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > settings.body_bytes:
            raise _refuse_long(settings)
    return bytes(body)


def _refuse_long(settings: Settings) -> Refused:
    # The rest of the body is not read, so nothing more can come over this connection.
    why = f"expected a body of at most {settings.body_bytes} bytes"
    return Refused(413, None, why, {"Connection": "close"})


def _strip_port(host: str) -> str:
    name, _, port = host.strip().lower().rpartition(":")
    name = name if name and port.isdecimal() else host.strip().lower()
    return name[1:-1] if name.startswith("[") and name.endswith("]") else name
