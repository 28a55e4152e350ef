"""Keys and values of the running requests: each has a row, so none move when others come."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

# Lengths are multiples of so many positions, as fast attention wants its masks.
_STEP = 8


class LayerSpec(NamedTuple):
    """A layer's keys and values: heads, elements of a head's key and value, dtype and device."""

    heads: int
    key_size: int
    value_size: int
    dtype: torch.dtype
    device: torch.device


class RowCache:
    """``rows`` of ``length`` positions for every layer: (rows, heads, length, head size).

    Positions that a row's tokens have not written are masked, but 0 * NaN is NaN: they are zero.
    """

    def __init__(
        self, rows: int, length: int, layers: Mapping[int, LayerSpec] | None = None
    ) -> None:
        self.rows, self.length = rows, length
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}
        # Positions of each row that may have been written.
        self._written = [0] * rows
        for layer, spec in (layers or {}).items():
            self._allocate(layer, spec)

    @property
    def specs(self) -> dict[int, LayerSpec]:
        """Specs of the layers that have been allocated."""
        return {
            layer: LayerSpec(k.shape[1], k.shape[3], v.shape[3], k.dtype, k.device)
            for layer, (k, v) in self.layers.items()
        }

    @property
    def nbytes(self) -> int:
        return sum(k.nbytes + v.nbytes for k, v in self.layers.values())

    def round_up(self, positions: int) -> int:
        """Returns how many positions to read of which so many matter."""
        return min(-(-positions // _STEP) * _STEP, self._padded)

    def announce(self, row: int, end: int) -> None:
        """Notes that positions before ``end`` of ``row`` will be written."""
        self._written[row] = max(self._written[row], end)

    def write(self, layer: int, rows: Tensor, at: Tensor, key: Tensor, value: Tensor) -> None:
        """Writes key, value (heads, T, size) of T tokens to rows (T,) and positions at (T,)."""
        if layer not in self.layers:
            heads, _, size = key.shape
            self._allocate(layer, LayerSpec(heads, size, value.shape[2], key.dtype, key.device))
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

    def _allocate(self, layer: int, spec: LayerSpec) -> None:
        shape = (self.rows, spec.heads, self._padded)
        keys, values = (
            torch.zeros(*shape, size, dtype=spec.dtype, device=spec.device)
            for size in (spec.key_size, spec.value_size)
        )
        self.layers[layer] = keys, values
