"""A request on its way: what it waits for, how far it is, and to whom its tokens go."""

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
from fastlora.serving.engine.sampling import Sampler


class Job:
    """Belongs to the engine's thread; others only set ``cancelled``.

    eos: tokens that end it. lent: its adapter, as soon as it is there. emit: takes its events.
    """

    def __init__(
        self,
        request: Request,
        eos: frozenset[int],
        lent: Future[Lease],
        device: torch.device,
        emit: Callable[[Event], Any],
    ) -> None:
        self.request, self.eos, self.lent, self.emit = request, eos, lent, emit
        self.sampler: Sampler | None = None
        if request.do_sample:
            seed = request.seed
            drawn = int(torch.randint(2**62, ())) if seed is None else seed
            self.sampler = Sampler(request, drawn, device)
        self.deadline = math.inf if request.timeout is None else time.monotonic() + request.timeout
        self.cancelled = False
        self.row: int | None = None
        # All its tokens, and how many of them are in the cache.
        self.tokens = list(request.prompt)
        self.fed = 0

    @property
    def due(self) -> int:
        """Tokens that are not in the cache yet."""
        return len(self.tokens) - self.fed

    def chunk(self, count: int) -> Chunk:
        """Its next ``count`` tokens."""
        assert self.row is not None
        tokens = self.tokens[self.fed : self.fed + count]
        slot = next(iter(self.lent.result().slots), -1)
        scale = float(self.request.scale)
        return Chunk(self.row, self.fed, tokens, slot, scale, last=count == self.due)

    def add(self, token: int) -> bool:
        """Hands on its next token; whether it was the last."""
        self.tokens.append(token)
        reason: FinishReason | None = None
        if token in self.eos:
            reason = "eos"
        elif len(self.tokens) == self.request.length:
            reason = "length"
        self.emit(Event(self.request, token, reason))
        return reason is not None

    def end(self, reason: FinishReason, error: BaseException | None = None) -> None:
        """Says that it has ended before its last token."""
        self.emit(Event(self.request, None, reason, error))

    def give_back(self) -> None:
        """Lets go of the adapter, or of the wish for it."""
        give_up(self.lent)
