"""``Job``: a request in the engine, with its lease, its tokens so far and where its events go."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import torch

from fastlora.serving.bank.lease import Lease, give_up
from fastlora.serving.engine.request import Event, FinishReason, Request
from fastlora.serving.engine.runner import Chunk
from fastlora.serving.engine.sampling import Sampler, Weights


class Job:
    """A request in the engine's thread; other threads only set ``cancelled``.

    eos: tokens that end it. lease: of its adapter, done when it is on the device. emit: takes its
    events.
    """

    def __init__(
        self,
        request: Request,
        eos: frozenset[int],
        lease: Future[Lease],
        device: torch.device,
        emit: Callable[[Event], Any],
    ) -> None:
        self.request, self.eos, self.lease, self.emit = request, eos, lease, emit
        self.sampler: Sampler | None = None
        if request.do_sample:
            seed = request.seed
            seed = int(torch.randint(2**62, ())) if seed is None else seed
            self.sampler = Sampler(request, seed, device)
        self.deadline = math.inf if request.timeout is None else time.monotonic() + request.timeout
        self.cancelled = False
        self.row: int | None = None
        # All its tokens, and how many of them are in the cache.
        self.tokens = list(request.prompt)
        self.cached = 0

    @property
    def due(self) -> int:
        """Tokens that are not in the cache yet."""
        return len(self.tokens) - self.cached

    def next_chunk(self, count: int) -> Chunk:
        """Returns its next ``count`` tokens."""
        assert self.row is not None
        tokens = self.tokens[self.cached : self.cached + count]
        slot = next(iter(self.lease.result().slots), -1)
        scale = float(self.request.scale)
        return Chunk(self.row, self.cached, tokens, slot, scale, last=count == self.due)

    def add(self, token: int, weights: Weights | None = None) -> bool:
        """Emits its next token; returns whether it was the last."""
        self.tokens.append(token)
        reason: FinishReason | None = None
        if token in self.eos:
            reason = "eos"
        elif len(self.tokens) == self.request.length:
            reason = "length"
        logprob, likeliest = weights or (None, ())
        self.emit(Event(self.request, token, reason, None, logprob, likeliest))
        return reason is not None

    def end(self, reason: FinishReason, error: BaseException | None = None) -> None:
        """Emits that it has ended before its last token."""
        self.emit(Event(self.request, None, reason, error))

    def release(self) -> None:
        """Releases its adapter, or stops waiting for it."""
        give_up(self.lease)
