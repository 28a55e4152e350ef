"""Keys and values of the running requests: a row each, so that nobody's move when others come."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

# Positions: lengths are multiples of it, as fast attention wants its masks.
_STEP = 8


class Kind(NamedTuple):
    """Of a layer's keys and values: heads, what a head's have elements, dtype and device."""

    heads: int
    key_size: int
    value_size: int
    dtype: torch.dtype
    device: torch.device


class RowCache:
    """``rows`` of ``length`` positions for every layer: (rows, heads, length, head size).

    Nobody reads past what a row's tokens have written, but 0 * NaN is NaN: what is free is zero.
    """

    def __init__(self, rows: int, length: int, layers: Mapping[int, Kind] | None = None) -> None:
        self.rows, self.length = rows, length
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}
        # Positions of each row that may have been written.
        self._written = [0] * rows
        for layer, kind in (layers or {}).items():
            self._allocate(layer, kind)

    @property
    def kinds(self) -> dict[int, Kind]:
        """What the layers are like, once they are there."""
        return {
            layer: Kind(k.shape[1], k.shape[3], v.shape[3], k.dtype, k.device)
            for layer, (k, v) in self.layers.items()
        }

    @property
    def nbytes(self) -> int:
        return sum(k.nbytes + v.nbytes for k, v in self.layers.values())

    def upto(self, positions: int) -> int:
        """How many positions to read of which so many matter."""
        return min(-(-positions // _STEP) * _STEP, self._padded)

    def announce(self, row: int, end: int) -> None:
        """Positions before ``end`` of ``row`` will be written."""
        self._written[row] = max(self._written[row], end)

    def write(self, layer: int, rows: Tensor, at: Tensor, key: Tensor, value: Tensor) -> None:
        """key, value (heads, T, size) of T tokens, to their rows (T,) and positions at (T,)."""
        if layer not in self.layers:
            kind = Kind(key.shape[0], key.shape[2], value.shape[2], key.dtype, key.device)
            self._allocate(layer, kind)
        keys, values = self.layers[layer]
        rows, at = rows.to(keys.device), at.to(keys.device)
        keys[rows, :, at] = key.transpose(0, 1)
        values[rows, :, at] = value.transpose(0, 1)

    def clear(self, row: int) -> None:
        """Frees a row."""
        end, self._written[row] = self._written[row], 0
        for keys, values in self.layers.values():
            keys[row, :, :end].zero_()
            values[row, :, :end].zero_()

    @property
    def _padded(self) -> int:
        return -(-self.length // _STEP) * _STEP

    def _allocate(self, layer: int, kind: Kind) -> None:
        shape = (self.rows, kind.heads, self._padded)
        keys, values = (
            torch.zeros(*shape, size, dtype=kind.dtype, device=kind.device)
            for size in (kind.key_size, kind.value_size)
        )
        self.layers[layer] = keys, values
