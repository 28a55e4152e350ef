"""Picks the next token of each row: the likeliest, or a draw by the request's generator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastlora.serving.engine.request import Request


class Sampler:
    """A request's draws from logits, always the same ones for a seed.

    device: of the logits. seed: of this request's generator, which no other request advances.
    """

    def __init__(self, request: Request, seed: int, device: torch.device) -> None:
        self._generator = torch.Generator(device).manual_seed(seed)
        self._none = torch.empty(1, 0, dtype=torch.long, device=device)
        self._warpers = _make_warpers(request)

    def __call__(self, logits: Tensor) -> Tensor:
        """Draws a token () for logits (V,), float32 and finite somewhere."""
        scores = logits[None]
        for warper in self._warpers:
            scores = warper(self._none, scores)
        return torch.multinomial(scores.softmax(-1), 1, generator=self._generator)[0, 0]


def _make_warpers(request: Request) -> list[Any]:
    """Makes transformers' warpers, in the order in which ``generate`` has them."""
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    warpers: list[Any] = []
    if request.temperature != 1:
        warpers.append(TemperatureLogitsWarper(float(request.temperature)))
    if request.top_k:
        warpers.append(TopKLogitsWarper(request.top_k))
    if request.top_p < 1:
        warpers.append(TopPLogitsWarper(float(request.top_p)))
    return warpers


def next_tokens(logits: Tensor, samplers: Sequence[Sampler | None]) -> list[int | None]:
    """Returns a token for each row of logits (n, V); None for a row without a finite maximum.

    samplers: one a row, None takes the likeliest. The device is waited for once.
    """
    wide = logits.float()
    best, tokens = wide.max(-1)
    usable = best.isfinite()
    for row, sampler in enumerate(samplers):
        if sampler is not None:
            # Drawing from NaN would end the process on a GPU.
            tokens[row] = sampler(torch.where(usable[row], wide[row], 0.0))
    drawn: list[int] = torch.where(usable, tokens, -1).tolist()
    return [None if token < 0 else token for token in drawn]
