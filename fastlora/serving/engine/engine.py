"""``Engine``: requests with different adapters join and leave one running batch."""

from __future__ import annotations

import atexit
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from queue import SimpleQueue
from typing import Any

from fastlora.ops import dispatch, invariance
from fastlora.serving.bank.lease import give_up
from fastlora.serving.engine.cache import RowCache
from fastlora.serving.engine.compatibility import check_model, eos_of
from fastlora.serving.engine.job import Job
from fastlora.serving.engine.loop import Loop
from fastlora.serving.engine.request import Event, Request, check_count
from fastlora.serving.engine.runner import Runner
from fastlora.serving.engine.scheduler import Scheduler
from fastlora.serving.engine.server import lease_adapter
from fastlora.serving.engine.stream import Channel, Stream
from fastlora.serving.protocol import Server


class Engine:
    """A thread that runs requests over a server's model, until it is closed.

    server: a ``MultiLoRAModel`` around a decoder of transformers with the usual attention; window
    attention included. max_rows: requests that run at a time, others wait. max_length: tokens that
    a request may come to, prompt and continuation; None: 2048, or what the model's positions allow
    if that is less. step_tokens: how many tokens a forward has: one of each request that writes
    (even where those are more), the others from prompts, which are read in parts.

    ``cache_bytes`` of keys and values, for max_rows times max_length tokens, are allocated here and
    freed by ``close``. A forward has all requests' tokens, whichever their adapters. Methods may be
    called from any thread, and the server may be called meanwhile. ``batch_invariant`` and
    ``use_backend`` hold in the engine where they hold in the thread that makes it. after_turn: is
    called in the engine's thread after each step, when its events have gone to ``send``'s callers;
    it must be quick and not raise.

    Raises TypeError or ValueError for sizes that are no whole numbers above 0, or a model that
    cannot be streamed, which a few tokens through it tell.
    """

    def __init__(
        self,
        server: Server,
        *,
        max_rows: int = 32,
        max_length: int | None = None,
        step_tokens: int = 512,
        after_turn: Callable[[], object] = int,
    ) -> None:
        check_count("max_rows", max_rows)
        check_count("step_tokens", step_tokens)
        fit = check_model(server, max_length)
        self.max_rows, self.max_length, self.step_tokens = max_rows, fit.max_length, step_tokens
        self._server, self._eos, self._vocabulary = server, eos_of(server), fit.vocabulary
        runner = Runner(server, RowCache(max_rows, fit.max_length, fit.layers))
        self.cache_bytes = runner.cache.nbytes
        self._device = runner.device
        self._inbox: SimpleQueue[Job | None] = SimpleQueue()
        self._loop = Loop(runner, Scheduler(max_rows, step_tokens), self._inbox, after_turn)
        settings = invariance.asked(), dispatch.asked()
        self._thread = threading.Thread(
            target=_run, args=(self._loop, *settings), name="fastlora-engine", daemon=True
        )
        _running[self._thread] = self._loop
        try:
            self._thread.start()
        except RuntimeError:
            del _running[self._thread]
            raise
        weakref.finalize(self, self._loop.close).atexit = False

    def submit(self, request: Request) -> Stream:
        """Queues a request; its tokens come to the stream, which cancels it when it is dropped.

        Raises TypeError or ValueError for what is wrong at first sight: no request, an unknown
        adapter, tokens that are not in the vocabulary, more of them than max_length; RuntimeError
        when the engine is closed. All other errors are raised by its stream alone.
        """
        channel = Channel()
        return Stream(self, request, channel, self.send(request, channel.put))

    def send(self, request: Request, emit: Callable[[Event], object]) -> Callable[[], None]:
        """Queues a request whose events go to ``emit``; returns what cancels it.

        emit: is called in the engine's thread; it must be quick and not raise. The cancelled
        request's last event comes after the step that runs. Raises as ``submit``.
        """
        job = self._queue(request, emit)
        inbox = self._inbox

        def cancel() -> None:
            # The garbage collector may call it, at any time in any thread: it must take no lock.
            job.cancelled = True
            inbox.put(None)

        return cancel

    def _queue(self, request: Request, emit: Callable[[Event], Any]) -> Job:
        """Queues a request; ``emit`` takes its events, quickly, in the engine's thread."""
        if not isinstance(request, Request):
            raise TypeError(f"request: expected a Request, got {type(request).__name__}")
        beyond = [token for token in request.prompt if token >= self._vocabulary]
        if beyond:
            raise ValueError(
                f"input_ids: expected tokens below {self._vocabulary}, got {beyond[0]}"
            )
        if request.length > self.max_length:
            raise ValueError(
                f"max_new_tokens: expected at most max_length={self.max_length} tokens in all, got "
                f"{len(request.prompt)} of the prompt and {request.max_new_tokens} new ones"
            )
        eos = self._eos if request.eos is None else request.eos
        lease = lease_adapter(self._server, request.adapter_name)
        try:
            job = Job(request, eos, lease, self._device, emit)
            self._loop.add(job)
        except BaseException:
            give_up(lease)
            raise
        inbox = self._inbox
        lease.add_done_callback(lambda _: inbox.put(None))
        return job

    def close(self) -> None:
        """Cancels requests that have not ended, waits for the step that runs, frees the cache."""
        self._loop.close()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def stream(server: Server, requests: Iterable[Request], **options: Any) -> Iterator[Event]:
    """Yields events of all requests as they come; options and errors of the model as ``Engine``'s.

    Requests are taken when there is room: as many as there are rows run, as many wait. An error
    that ``Engine.submit`` would raise is that request's event, and the others go on.
    """
    return _yield_events(Engine(server, **options), iter(requests))


def _yield_events(engine: Engine, requests: Iterator[Request]) -> Iterator[Event]:
    events: SimpleQueue[Event] = SimpleQueue()
    unfinished, more = 0, True
    with engine:
        while more or unfinished:
            while more and unfinished < 2 * engine.max_rows:
                try:
                    request = next(requests)
                except StopIteration:
                    more = False
                    break
                try:
                    engine._queue(request, events.put)
                except (TypeError, ValueError) as error:
                    yield Event(request, None, "error", error)
                else:
                    unfinished += 1
            if unfinished:
                event = events.get()
                unfinished -= event.finish_reason is not None
                yield event


# Loops of the threads that run. Engines may be collected while their last step still runs.
_running: dict[threading.Thread, Loop] = {}


def _run(loop: Loop, invariant: bool, backend: str | None) -> None:
    try:
        loop.run(invariant, backend)
    finally:
        _running.pop(threading.current_thread(), None)


@atexit.register
def _close_all() -> None:
    """A thread within a forward does not survive the interpreter."""
    for thread, loop in list(_running.items()):
        loop.close()
        thread.join()
