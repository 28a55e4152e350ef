"""Operands for C functions: any strides and types, with guards around every buffer."""

import os
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st

from fastlora.backends import native

if native.unusable() is not None:
    pytest.skip(str(native.unusable()), allow_module_level=True)


LIBRARY = native.functions()


SETS = native.available().split(", ")


GUARD = 0 if "ASAN_OPTIONS" in os.environ else 64


F32, BF16, F16 = 0, 1, 2


# Largest relative error of one rounding, of a call's few.
ROUNDING = {F32: 1e-5, BF16: 3e-2, F16: 4e-3}


many = settings(max_examples=300, deadline=None)


def encoded(values: np.ndarray, dtype: int) -> np.ndarray:
    if dtype == F32:
        return values.astype(np.float32)
    if dtype == F16:
        return values.astype(np.float16)
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def decoded(raw: np.ndarray, dtype: int) -> np.ndarray:
    if dtype == BF16:
        return (raw.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return raw.astype(np.float64)


@dataclass
class Matrix:
    """Rows of unit columns, ``ld`` elements apart, between guards."""

    values: np.ndarray
    dtype: int
    ld: int
    raw: np.ndarray = field(init=False)
    before: bytes = field(init=False)

    def __post_init__(self) -> None:
        rows, columns = self.values.shape
        size = (rows - 1) * self.ld + columns if rows and columns else 0
        item = 4 if self.dtype == F32 else 2
        self.raw = np.full(2 * GUARD + size * item, 0xA5, np.uint8)
        self.rows()[...] = encoded(self.values, self.dtype)
        self.before = self.raw.tobytes()

    def rows(self) -> np.ndarray:
        kind = {F32: np.float32, BF16: np.uint16, F16: np.float16}[self.dtype]
        data = self.raw[GUARD : len(self.raw) - GUARD].view(kind)
        strides = (self.ld * data.itemsize, data.itemsize)
        return np.lib.stride_tricks.as_strided(data, self.values.shape, strides)

    def get(self) -> np.ndarray:
        return decoded(np.ascontiguousarray(self.rows()), self.dtype)

    @property
    def pointer(self) -> int | None:
        return self.raw.ctypes.data + GUARD if self.values.size else None

    def same(self) -> bool:
        return self.raw.tobytes() == self.before

    def only_values_changed(self) -> bool:
        now = self.get()
        self.rows()[...] = encoded(self.values, self.dtype)
        untouched = self.same()
        self.rows()[...] = encoded(now, self.dtype)
        return untouched


sizes = st.one_of(st.integers(0, 5), st.integers(6, 70))


seeds = st.integers(0, 2**32 - 1)
