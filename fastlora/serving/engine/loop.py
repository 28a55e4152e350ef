"""The engine's thread: who has come, who has to go, a step, and again."""

from __future__ import annotations

import math
import threading
import time
import traceback
from contextlib import ExitStack
from queue import Empty, SimpleQueue

import torch

from fastlora.ops import dispatch, invariance
from fastlora.serving.engine.attention_hook import hooked
from fastlora.serving.engine.job import Job
from fastlora.serving.engine.request import FinishReason
from fastlora.serving.engine.runner import Runner
from fastlora.serving.engine.sampling import next_tokens
from fastlora.serving.engine.scheduler import Scheduler


class Loop:
    """Runs what comes to ``inbox`` until it is closed; None wakes it to look again.

    A SimpleQueue, since the garbage collector may put into it while anything is locked.
    """

    def __init__(
        self, runner: Runner, scheduler: Scheduler, inbox: SimpleQueue[Job | None]
    ) -> None:
        self.runner, self.scheduler, self.inbox = runner, scheduler, inbox
        self._lock = threading.Lock()
        self._closed: BaseException | bool = False

    def add(self, job: Job) -> None:
        """From any thread; RuntimeError when it is closed."""
        with self._lock:
            if self._closed:
                failed = isinstance(self._closed, BaseException)
                why = f"stopped: {self._closed}" if failed else "closed"
                raise RuntimeError(f"request: the engine is {why}")
            self.inbox.put(job)

    def close(self) -> None:
        """Lets it end after the step that runs. Takes no lock: the garbage collector calls it."""
        self._closed = self._closed or True
        self.inbox.put(None)

    def run(self, invariant: bool, backend: str | None) -> None:
        """All of the thread. invariant, backend: what its maker had asked of its own calls."""
        try:
            with ExitStack() as within:
                within.enter_context(hooked(self.runner.server.model))
                if invariant:
                    within.enter_context(invariance.batch_invariant())
                if backend is not None:
                    within.enter_context(dispatch.use_backend(backend))
                if self.runner.device.type == "cuda":
                    torch.cuda.set_device(self.runner.device)
                self._turns()
        except BaseException as error:
            self._closed = _lightened(error)
        finally:
            self._end()

    def _turns(self) -> None:
        while True:
            self._receive()
            if self._closed:
                return
            self._let_go()
            self.scheduler.admit()
            self._step()

    def _receive(self) -> None:
        """Takes what has come; waits for it where there is nothing to do."""
        timeout = 0.0
        if self.scheduler.idle:
            soonest = min((job.deadline for job in self.scheduler.waiting), default=math.inf)
            timeout = None if soonest == math.inf else max(soonest - time.monotonic(), 0)
        try:
            while True:
                job = self.inbox.get(timeout=timeout) if timeout != 0 else self.inbox.get_nowait()
                timeout = 0.0
                if job is not None:
                    self.scheduler.waiting.append(job)
        except Empty:
            pass

    def _let_go(self) -> None:
        """Ends who is cancelled, late, or gets no adapter."""
        now = time.monotonic()
        for job in list(self.scheduler):
            if job.cancelled:
                self._leave(job, "cancelled")
            elif job.deadline <= now:
                self._leave(job, "timeout")
            elif job.row is None and job.lent.done() and job.lent.exception() is not None:
                self._leave(job, "error", job.lent.exception())

    def _step(self) -> None:
        plan = self.scheduler.plan()
        if not plan:
            return
        try:
            logits = self.runner.step([chunk for _, chunk in plan])
            asking = [job for job, chunk in plan if chunk.last]
            tokens = next_tokens(logits, [job.sampler for job in asking]) if asking else []
        except Exception as error:
            light = _lightened(error)
            for job, _ in plan:
                what = f"the step's forward failed: {type(light).__name__}: {light}"
                own = RuntimeError(what)
                own.__cause__ = light
                self._leave(job, "error", own)
            return
        for job, chunk in plan:
            job.fed += len(chunk.tokens)
        for job, token in zip(asking, tokens, strict=True):
            if token is None:
                name = job.request.adapter_name
                what = f"adapter_name: the logits with {name!r} are not finite"
                self._leave(job, "error", RuntimeError(what))
            elif job.add(token):
                self._leave(job)

    def _leave(
        self, job: Job, reason: FinishReason | None = None, error: BaseException | None = None
    ) -> None:
        row = self.scheduler.leave(job)
        if row is not None:
            self.runner.cache.clear(row)
        job.give_back()
        if reason is not None:
            job.end(reason, error)

    def _end(self) -> None:
        """Nobody waits for ever, whatever has ended the loop."""
        with self._lock:
            self._closed = self._closed or True
        failure = self._closed if isinstance(self._closed, BaseException) else None
        jobs = list(self.scheduler)
        while not self.inbox.empty():
            job = self.inbox.get()
            if job is not None:
                jobs.append(job)
        for job in jobs:
            job.give_back()
            job.end("error" if failure else "cancelled", failure)
        self.scheduler.running, self.scheduler.waiting = [], []
        self.runner.cache.layers.clear()


def _lightened(error: BaseException) -> BaseException:
    """The error without the frames that it passed, which hold a step's tensors."""
    seen: BaseException | None = error
    while seen is not None:
        traceback.clear_frames(seen.__traceback__)
        seen.__traceback__ = None
        seen = seen.__cause__ or seen.__context__
    return error
