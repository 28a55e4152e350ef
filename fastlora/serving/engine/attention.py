"""Attention of a step: every token of the flat batch (1, T) sees its row of the cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as nnf

from fastlora.serving.engine.cache import RowCache


class Piece(NamedTuple):
    """Tokens of one row that come to its cache: positions ``start`` to ``end``."""

    row: int
    start: int
    end: int


class Step:
    """What one forward reads: the first ``singles`` of the pieces have a token each, in row order.

    One call attends for all of these, over rows up to the last of them and positions up to the
    longest; one for each longer piece. Queries that share keys lie side by side, so that keys are
    never repeated.
    """

    def __init__(
        self, cache: RowCache, pieces: Sequence[Piece], singles: int, device: torch.device
    ) -> None:
        self.cache, self.pieces, self.singles = cache, pieces, singles
        at = [position for p in pieces for position in range(p.start, p.end)]
        rows = [p.row for p in pieces for _ in range(p.start, p.end)]
        self.rows, self.positions = torch.tensor([rows, at], device=device).unbind()
        for piece in pieces:
            cache.announce(piece.row, piece.end)
        self.top = max((p.row + 1 for p in pieces[:singles]), default=0)
        self.seen = cache.round_up(max((p.end for p in pieces[:singles]), default=0))
        self.layers: set[int] = set()
        self._masks: dict[Any, Tensor] = {}

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float | None,
        window: int | None,
    ) -> Tensor:
        """Attends with query (1, heads, T, size), to (1, T, heads, size).

        key, value: of as many heads or fewer; they are written to the cache first.
        window: how many positions a token sees, itself included; None: all before it.
        """
        if layer in self.layers:
            raise ValueError(f"layer {layer} attends twice a step")
        self.layers.add(layer)
        self.cache.write(layer, self.rows, self.positions, key[0], value[0])
        keys, values = self.cache.layers[layer]
        parts, first = [], self.singles
        if self.singles:
            parts.append(self._attend_singles(query[0, :, :first], keys, values, scaling, window))
        for piece in self.pieces[self.singles :]:
            after = first + piece.end - piece.start
            mask = self._mask_of(piece, window, query)
            q, past = query[0, :, first:after], slice(mask.shape[-1])
            k, v = keys[piece.row, :, past], values[piece.row, :, past]
            parts.append(_attend_piece(q, k, v, mask, scaling))
            first = after
        return torch.cat(parts)[None]

    def _attend_singles(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        scaling: float | None,
        window: int | None,
    ) -> Tensor:
        """Attends with query (heads, n, size) of n rows, to (n, heads, size)."""
        heads, n, size = query.shape
        query = query.transpose(0, 1)
        rows = self.rows[:n].to(query.device)
        if n < self.top:
            # Rows between them that have no token in this step take part with zeros.
            query = query.new_zeros(self.top, heads, size).index_copy_(0, rows, query)
        y = nnf.scaled_dot_product_attention(
            query.reshape(self.top, keys.shape[1], -1, size),
            keys[: self.top, :, : self.seen],
            values[: self.top, :, : self.seen],
            self._mask_of_singles(window, query),
            scale=scaling,
        ).reshape(self.top, heads, -1)
        return y if n == self.top else y[rows]

    def _mask_of_singles(self, window: int | None, like: Tensor) -> Tensor:
        """Makes (top, 1, 1, seen), added to scores; rows without a token see one position."""

        def hide() -> Tensor:
            last = torch.zeros(self.top, dtype=torch.long)
            for piece in self.pieces[: self.singles]:
                last[piece.row] = piece.start
            return _hide(last.to(like.device), self.seen, window)[:, None, None]

        return self._make_once((window, None), hide, like)

    def _mask_of(self, piece: Piece, window: int | None, like: Tensor) -> Tensor:
        """Makes (tokens of the piece, positions to read), added to scores."""

        def hide() -> Tensor:
            last = torch.arange(piece.start, piece.end, device=like.device)
            return _hide(last, self.cache.round_up(piece.end), window)

        return self._make_once((window, piece.row), hide, like)

    def _make_once(self, key: Any, hide: Callable[[], Tensor], like: Tensor) -> Tensor:
        """Makes a mask, once a step for all layers that have the same."""
        key = (*key, like.dtype, like.device)
        if key not in self._masks:
            hidden = hide()
            self._masks[key] = hidden.to(like.dtype).masked_fill_(hidden, float("-inf"))
        return self._masks[key]


def _attend_piece(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scaling: float | None
) -> Tensor:
    """Attends with query (heads, n, size), keys (fewer heads, L, size) and mask (n, L).

    Returns (n, heads, size).
    """
    heads, n, size = query.shape
    shared = heads // keys.shape[0]
    y = nnf.scaled_dot_product_attention(
        query.reshape(1, keys.shape[0], shared * n, size),
        keys[None],
        values[None],
        mask.repeat(shared, 1),
        scale=scaling,
    )
    return y.reshape(heads, n, -1).transpose(0, 1)


def _hide(last: Tensor, positions: int, window: int | None) -> Tensor:
    """Returns which of the positions tokens at ``last`` (n,) do not see: (n, positions)."""
    at = torch.arange(positions, device=last.device)
    after = at > last[:, None]
    return after if window is None else after | (at <= last[:, None] - window)
