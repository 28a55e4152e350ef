"""The engine's thread: takes new requests, ends those that are over, runs a step, and again."""

from __future__ import annotations

import math
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from queue import Empty, SimpleQueue

import torch

from fastlora.ops import dispatch, invariance
from fastlora.serving.engine.attention_hook import hook_attention
from fastlora.serving.engine.job import Job
from fastlora.serving.engine.request import FinishReason
from fastlora.serving.engine.runner import Runner
from fastlora.serving.engine.sampling import next_tokens, weigh_tokens
from fastlora.serving.engine.scheduler import Scheduler


class Loop:
    """Runs what comes to ``inbox`` until it is closed; None wakes it to look again.

    A SimpleQueue, since the garbage collector may put into it while anything is locked.
    after_turn: called when a turn's events have been emitted; it must not raise.
    """

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        inbox: SimpleQueue[Job | None],
        after_turn: Callable[[], object] = int,
    ) -> None:
        self._after_turn = after_turn
        self.runner, self.scheduler, self.inbox = runner, scheduler, inbox
        self._lock = threading.Lock()
        self._closed: BaseException | bool = False

    def add(self, job: Job) -> None:
        """Queues a job, from any thread; RuntimeError when the loop is closed."""
        with self._lock:
            if self._closed:
                failed = isinstance(self._closed, BaseException)
                why = f"stopped: {self._closed}" if failed else "closed"
                raise RuntimeError(f"request: the engine is {why}")
            self.inbox.put(job)

    def close(self) -> None:
        """Ends the loop after the step that runs. Takes no lock: the garbage collector calls it."""
        self._closed = self._closed or True
        self.inbox.put(None)

    def run(self, invariant: bool, backend: str | None) -> None:
        """Runs in the thread. invariant, backend: what the thread that made the engine had set."""
        try:
            with ExitStack() as within:
                within.enter_context(hook_attention(self.runner.server.model))
                if invariant:
                    within.enter_context(invariance.batch_invariant())
                if backend is not None:
                    within.enter_context(dispatch.use_backend(backend))
                if self.runner.device.type == "cuda":
                    torch.cuda.set_device(self.runner.device)
                self._take_turns()
        except BaseException as error:
            self._closed = _strip_frames(error)
        finally:
            self._end()

    def _take_turns(self) -> None:
        while True:
            self._receive()
            if self._closed:
                return
            self._end_jobs()
            self.scheduler.admit()
            self._step()
            self._after_turn()

    def _receive(self) -> None:
        """Takes new jobs; waits for one where there is nothing to do."""
        timeout = 0.0
        if self.scheduler.is_idle:
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

    def _end_jobs(self) -> None:
        """Ends jobs that are cancelled, late, or have an adapter that cannot be read."""
        now = time.monotonic()
        for job in list(self.scheduler):
            if job.cancelled:
                self._leave(job, "cancelled")
            elif job.deadline <= now:
                self._leave(job, "timeout")
            elif job.row is None and job.lease.done() and job.lease.exception() is not None:
                self._leave(job, "error", job.lease.exception())

    def _step(self) -> None:
        plan = self.scheduler.plan()
        if not plan:
            return
        try:
            logits = self.runner.step([chunk for _, chunk in plan])
            asking = [job for job, chunk in plan if chunk.last]
            tokens = next_tokens(logits, [job.sampler for job in asking]) if asking else []
            weights = weigh_tokens(logits, tokens, [job.request.logprobs for job in asking])
        except Exception as error:
            cause = _strip_frames(error)
            for job, _ in plan:
                reason = f"the step's forward failed: {type(cause).__name__}: {cause}"
                of_job = RuntimeError(reason)
                of_job.__cause__ = cause
                self._leave(job, "error", of_job)
            return
        for job, chunk in plan:
            job.cached += len(chunk.tokens)
        for job, token, weight in zip(asking, tokens, weights, strict=True):
            if token is None:
                name = job.request.adapter_name
                reason = f"adapter_name: the logits with {name!r} are not finite"
                self._leave(job, "error", RuntimeError(reason))
            elif job.add(token, weight):
                self._leave(job)

    def _leave(
        self, job: Job, reason: FinishReason | None = None, error: BaseException | None = None
    ) -> None:
        row = self.scheduler.leave(job)
        if row is not None:
            self.runner.cache.clear(row)
        job.release()
        if reason is not None:
            job.end(reason, error)

    def _end(self) -> None:
        """Ends all jobs, whatever has ended the loop, so that no caller waits for ever."""
        with self._lock:
            self._closed = self._closed or True
        failure = self._closed if isinstance(self._closed, BaseException) else None
        jobs = list(self.scheduler)
        while not self.inbox.empty():
            job = self.inbox.get()
            if job is not None:
                jobs.append(job)
        for job in jobs:
            job.release()
            job.end("error" if failure else "cancelled", failure)
        self._after_turn()
        self.scheduler.running, self.scheduler.waiting = [], []
        self.runner.cache.layers.clear()


def _strip_frames(error: BaseException) -> BaseException:
    """Removes the frames that an error passed, which hold a step's tensors; returns the error."""
    seen: BaseException | None = error
    while seen is not None:
        traceback.clear_frames(seen.__traceback__)
        seen.__traceback__ = None
        seen = seen.__cause__ or seen.__context__
    return error
