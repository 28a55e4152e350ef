"""The parts of several slices added to y in one native call, whose operands are bound once.

A step of a decoder makes a hundred such calls with the same adapters: reading their pointers and
strides anew costs more there than the products.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastlora.backends import native
from fastlora.backends.in_place import mark_written


class BoundSlices:
    """lora_A (S, R, K), lora_B (S, N, R) of each slice, with columns of unit stride.

    scalings float32 (S,); ranks int32 (S,) of each slice, or None for all R. The tensors are kept,
    and bound again where their memory has moved.
    """

    def __init__(
        self,
        lora_A: Sequence[Tensor],
        lora_B: Sequence[Tensor],
        scalings: Tensor,
        ranks: Sequence[Tensor | None],
    ) -> None:
        self.lora_A, self.lora_B, self.scalings, self.ranks = lora_A, lora_B, scalings, ranks
        counted = [t for t in ranks if t is not None]
        self._tensors = (*lora_A, *lora_B, scalings, *counted)
        self._bind()

    def _bind(self) -> None:
        self._pointers = [t.data_ptr() for t in self._tensors]
        rows, column = [], 0
        for A, B, ranks in zip(self.lora_A, self.lora_B, self.ranks, strict=True):
            rows += [A.data_ptr(), *A.stride()[:2], B.data_ptr(), *B.stride()[:2]]
            rows += [column, B.shape[1], 0 if ranks is None else ranks.data_ptr()]
            column += B.shape[1]
        self._slices = (ctypes.c_int64 * len(rows))(*rows)
        S, R, K = self.lora_A[0].shape
        self._sizes = K, R, S
        self._scalings = self.scalings.data_ptr()
        self._lora_dtype = native.DTYPES[self.lora_A[0].dtype]
        self._add = native.functions().fastlora_multi_lora_add

    def add_(self, y: Tensor, x: Tensor, order: Tensor, starts: Tensor) -> None:
        """Adds to y (T, N of all slices) for x (T, K); both have unit columns, order all T rows."""
        if [t.data_ptr() for t in self._tensors] != self._pointers:
            self._bind()
        code = self._add(
            y.data_ptr(), y.stride(0), x.data_ptr(), x.stride(0), self._slices,
            len(self.lora_A), order.data_ptr(), starts.data_ptr(), self._scalings, None,
            x.shape[0], *self._sizes, native.DTYPES[x.dtype], self._lora_dtype,
            torch.get_num_threads(),
        )  # fmt: skip
        if code == native.NOT_FINITE:
            numbers = self.scalings.tolist()
            slot = next(s for s, number in enumerate(numbers) if not math.isfinite(number))
            raise ValueError(
                f"scalings: expected finite numbers, got {numbers[slot]} for slot {slot}"
            )
        native.check(code, "multi_lora_add_")
        mark_written(y)
