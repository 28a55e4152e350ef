"""Picks the next token of each row: the likeliest, or a draw by the request's generator.

And says how likely it was, and which others were likely, where the request asks for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlora.serving.engine.request import Request


class Weights(NamedTuple):
    """A token's log-probability, and the likeliest tokens with theirs."""

    logprob: float
    likeliest: tuple[tuple[int, float], ...]


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


def weigh_tokens(
    logits: Tensor, tokens: Sequence[int | None], asked: Sequence[int | None]
) -> list[Weights | None]:
    """Returns log-probabilities for the rows of logits (n, V) that have a token and ask for them.

    asked: how many of the likeliest tokens each row wants beside its own; None: nothing at all.
    """
    weights: list[Weights | None] = [None] * len(tokens)
    rows = [
        row
        for row, (token, count) in enumerate(zip(tokens, asked, strict=True))
        if token is not None and count is not None
    ]
    if not rows:
        return weights
    chosen = logits[rows].float().log_softmax(-1)
    most = min(max(asked[row] or 0 for row in rows), chosen.shape[-1])
    values, indices = chosen.topk(most, dim=-1)
    own = chosen[range(len(rows)), [tokens[row] or 0 for row in rows]].tolist()
    for row, logprob, ids, theirs in zip(rows, own, indices.tolist(), values.tolist(), strict=True):
        weights[row] = Weights(logprob, tuple(zip(ids, theirs, strict=True))[: asked[row]])
    return weights
