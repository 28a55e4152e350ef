"""Runs the application in one process, until a signal: then what runs may finish, for a while."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import signal
import socket
from collections.abc import Callable, Iterator

import uvicorn

from fastlora.serving.http.app import make_app
from fastlora.serving.http.keys import Keys
from fastlora.serving.http.service import Service

# Seconds between two looks at what still runs, and that ends may take to reach their clients.
_LOOK, _ENDING = 0.05, 5
_CONNECTIONS = 4096


def check_address(host: str, keys: Keys) -> None:
    """Raises ValueError for an address beyond this machine where no keys are asked for."""
    if not is_loopback(host) and not keys.required:
        raise ValueError(
            f"host: expected keys for an address that others reach, got {host!r} without any: "
            "give --keys FILE or FASTLORA_API_KEY, or bind to 127.0.0.1"
        )


def is_loopback(host: str) -> bool:
    """Whether an address, or the name localhost, is this machine's own."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def listen(host: str, port: int) -> socket.socket:
    """Listens on an address; port 0: any that is free. Raises OSError where that is taken."""
    family, kind, protocol, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(1024)
    except BaseException:
        listener.close()
        raise
    return listener


class Server(uvicorn.Server):
    """Serves a service on a socket that listens. on_ready: called once it does."""

    def __init__(
        self, service: Service, listener: socket.socket, on_ready: Callable[[], object] = int
    ) -> None:
        super().__init__(
            uvicorn.Config(
                make_app(service),
                log_config=None,
                access_log=False,
                server_header=False,
                lifespan="off",
                ws="none",
                limit_concurrency=_CONNECTIONS,
                timeout_graceful_shutdown=_ENDING,
            )
        )
        self._service, self._listener, self._on_ready = service, listener, on_ready
        self._stop = asyncio.Event()
        self._signals = 0

    def run_until_stopped(self) -> None:
        """Runs until a signal, or ``stop``, has ended it; the service is closed then."""
        try:
            self.run([self._listener])
        finally:
            self._listener.close()
            self._service.close()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._loop = asyncio.get_running_loop()
        self._stopping = asyncio.ensure_future(self._stop_gracefully())
        self._on_ready()

    def stop(self) -> None:
        """Stops as a signal does, from any thread; a second time without waiting."""
        self._loop.call_soon_threadsafe(self._note_signal)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """In uvicorn's place, whose own end connections at once and the process by the signal."""
        loop = asyncio.get_running_loop()
        handled = []
        for number in (signal.SIGINT, signal.SIGTERM):
            # Only the main thread can have handlers.
            with contextlib.suppress(RuntimeError, ValueError):
                loop.add_signal_handler(number, self._note_signal)
                handled.append(number)
        try:
            yield
        finally:
            for number in handled:
                loop.remove_signal_handler(number)

    def _note_signal(self) -> None:
        self._signals += 1
        self._stop.set()

    async def _stop_gracefully(self) -> None:
        await self._stop.wait()
        service = self._service
        service.stopping = True
        end = self._loop.time() + service.settings.grace
        while not service.is_idle and self._loop.time() < end and self._signals < 2:
            await asyncio.sleep(_LOOK)
        service.cancel_all()
        self.should_exit = True
