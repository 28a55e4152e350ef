"""Attention of a step: every token of the flat batch (1, T) sees its own row of the cache.

transformers' models call what their config names, with the new tokens' queries, keys and values.
While a step runs, in its thread alone, that is ``Step.attend``: it keeps keys and values in the
cache and reads them there, so that no tensor of transformers' ever holds what is past.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

from fastlora.serving.cache import RowCache

_NAME = "fastlora_rows"
# What some models give their attention that is not computed here.
_REFUSED = ("softcap", "s_aux", "sinks", "position_bias", "head_mask")


class Piece(NamedTuple):
    """Tokens of one row, ``count`` of them, that come to its cache from position ``start``."""

    row: int
    start: int
    count: int


class Step:
    """What one forward reads: the first ``singles`` of the pieces have a token each, in row order.

    Those are attended to together, over all rows up to the last of them and up to the longest; a
    longer piece by itself. Queries that share keys lie side by side, so keys are never repeated.
    """

    def __init__(
        self, cache: RowCache, pieces: Sequence[Piece], singles: int, device: torch.device
    ) -> None:
        self.cache, self.pieces, self.singles = cache, pieces, singles
        at = [p.start + i for p in pieces for i in range(p.count)]
        rows = [p.row for p in pieces for _ in range(p.count)]
        self.rows, self.positions = torch.tensor([rows, at], device=device).unbind()
        for piece in pieces:
            cache.announce(piece.row, piece.start + piece.count)
        alone = pieces[:singles]
        self.top = max((p.row + 1 for p in alone), default=0)
        self.seen = cache.upto(max((p.start + 1 for p in alone), default=0))
        self.layers: set[int] = set()
        self._masks: dict[Any, Tensor] = {}

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float | None,
        window: int | None,
    ) -> Tensor:
        """query (1, heads, T, size), key and value of as many heads or fewer: (1, T, heads, size).

        window: how many positions a token sees, itself included; None: all before it.
        """
        layer: int = module.layer_idx  # pyright: ignore[reportAssignmentType]
        if layer in self.layers:
            raise ValueError(f"layer {layer} attends twice a step")
        self.layers.add(layer)
        self.cache.write(layer, self.rows, self.positions, key[0], value[0])
        keys, values = self.cache.layers[layer]
        parts, first = [], self.singles
        if self.singles:
            mask = self._mask_of_singles(window, query)
            parts.append(self._singles(query[0, :, : self.singles], keys, values, mask, scaling))
        for piece in self.pieces[self.singles :]:
            mask = self._mask_of(piece, window, query)
            own, past = query[0, :, first : first + piece.count], slice(mask.shape[-1])
            parts.append(_piece(own, keys[piece.row, :, past], values[piece.row, :, past], mask, scaling))
            first += piece.count
        return torch.cat(parts)[None]

    def _singles(
        self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scaling: float | None
    ) -> Tensor:
        """query (heads, n, size) of n rows to (n, heads, size)."""
        heads, n, size = query.shape
        query = query.transpose(0, 1)
        rows = self.rows[:n].to(query.device)
        if n < self.top:
            # Rows between that have no token now take part with zeros.
            query = query.new_zeros(self.top, heads, size).index_copy_(0, rows, query)
        grouped = query.reshape(self.top, keys.shape[1], -1, size)
        past = slice(self.seen)
        y = nnf.scaled_dot_product_attention(
            grouped, keys[: self.top, :, past], values[: self.top, :, past], mask, scale=scaling
        ).reshape(self.top, heads, -1)
        return y if n == self.top else y[rows]

    def _mask_of_singles(self, window: int | None, like: Tensor) -> Tensor:
        """(top, 1, 1, seen), added to scores; rows without a token see their first position."""

        def mask() -> Tensor:
            last = torch.zeros(self.top, dtype=torch.long)
            for piece in self.pieces[: self.singles]:
                last[piece.row] = piece.start
            return _visible(last, self.seen, window)[:, None, None]

        return self._made((window, None), mask, like)

    def _mask_of(self, piece: Piece, window: int | None, like: Tensor) -> Tensor:
        """(count, positions to read), added to scores."""
        end = piece.start + piece.count

        def mask() -> Tensor:
            return _visible(torch.arange(piece.start, end), self.cache.upto(end), window)

        return self._made((window, piece.row), mask, like)

    def _made(self, key: Any, make: Any, like: Tensor) -> Tensor:
        """A mask, made once a step for all layers of a kind."""
        key = (*key, like.dtype, like.device)
        if key not in self._masks:
            hidden = ~make().to(like.device)
            self._masks[key] = hidden.to(like.dtype).masked_fill_(hidden, float("-inf"))
        return self._masks[key]


def _piece(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scaling: float | None
) -> Tensor:
    """query (heads, n, size), keys (fewer heads, L, size), mask (n, L): to (n, heads, size)."""
    heads, n, size = query.shape
    shared = heads // keys.shape[0]
    grouped = query.reshape(1, keys.shape[0], shared * n, size)
    y = nnf.scaled_dot_product_attention(
        grouped, keys[None], values[None], mask.repeat(shared, 1), scale=scaling
    )
    return y.reshape(heads, n, -1).transpose(0, 1)


def _visible(last: Tensor, positions: int, window: int | None) -> Tensor:
    """(n, positions): which ones are seen by tokens at ``last`` (n,)."""
    at = torch.arange(positions)
    seen = at <= last[:, None]
    return seen if window is None else seen & (at > last[:, None] - window)


class _Running(threading.local):
    step: Step | None = None


_running = _Running()
_lock = threading.Lock()
# Configs that have been given a class of ours, and by how many.
_lent: dict[int, int] = {}


@contextmanager
def attending(step: Step) -> Iterator[None]:
    """Within, this thread's forward of a model within ``routed_attention`` is the step's."""
    _running.step = step
    try:
        yield
    finally:
        _running.step = None


@contextmanager
def routed_attention(model: nn.Module) -> Iterator[None]:
    """Within, ``attending`` decides what the model's attention is; other threads notice nothing."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS[_NAME] = _attend
    configs = {
        id(module.config): module.config
        for module in model.modules()
        if hasattr(type(getattr(module, "config", None)), "_attn_implementation")
    }
    with _lock:
        for key, config in configs.items():
            _lent[key] = _lent.get(key, 0) + 1
            if _lent[key] == 1:
                config.__class__ = _routed(type(config))
    try:
        yield
    finally:
        with _lock:
            for key, config in configs.items():
                _lent[key] -= 1
                if not _lent[key]:
                    del _lent[key]
                    config.__class__ = type(config).__base__


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """The signature that transformers' models call."""
    step = _running.step
    assert step is not None
    given = [name for name in _REFUSED if options.get(name) is not None]
    if given or not getattr(module, "is_causal", True) or not hasattr(module, "layer_idx"):
        what = f"attention with {given[0]}" if given else "such attention"
        raise ValueError(f"{type(module).__name__}: {what} is not streamed")
    return step.attend(module, query, key, value, scaling, sliding_window), None


@cache
def _routed(kind: type) -> type:
    """A config's class whose objects name our attention in a thread that runs a step."""

    def name(self: Any) -> Any:
        return kind._attn_implementation.fget(self) if _running.step is None else _NAME  # pyright: ignore[reportAttributeAccessIssue]

    def rename(self: Any, value: Any) -> None:
        kind._attn_implementation.fset(self, value)  # pyright: ignore[reportAttributeAccessIssue]

    def reduced(self: Any, protocol: Any) -> Any:
        # Copies are of the class that there was.
        make, args, *rest = kind.__reduce_ex__(self, protocol)
        return make, tuple(kind if a is type(self) else a for a in args), *rest

    parts = {"_attn_implementation": property(name, rename), "__reduce_ex__": reduced}
    return type(kind.__name__, (kind,), parts | {"__module__": kind.__module__})
