"""Tensors that stay in their file: read a few rows at a time, and compared with others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastlora.backends.dtypes import CODES

# Bytes read at a time.
_CHUNK = 1 << 24
_HALVES = (torch.bfloat16, torch.float16)
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Stored:
    """A tensor of a safetensors file with one dimension or more. key: its name there."""

    path: Path
    key: str

    @property
    def shape(self) -> tuple[int, ...]:
        with self._open() as file:
            return tuple(file.get_slice(self.key).get_shape())

    @property
    def dtype(self) -> torch.dtype | None:
        """None of what is no float."""
        with self._open() as file:
            return CODES.get(file.get_slice(self.key).get_dtype())

    def read(self) -> Tensor:
        """Reads all of it, to the CPU."""
        with self._open() as file:
            return file.get_tensor(self.key)

    def chunks(self) -> Iterator[tuple[int, Tensor]]:
        """Its rows in order, some at a time, each time with the first one's number."""
        with self._open() as file:
            part = file.get_slice(self.key)
            rows, *row_shape = part.get_shape()
            step = max(1, _CHUNK // max(1, 8 * torch.Size(row_shape).numel()))
            for start in range(0, rows, step):
                yield start, part[start : min(rows, start + step)]

    def _open(self) -> safe_open:
        try:
            return safe_open(self.path, framework="pt")
        except SafetensorError as error:
            raise ValueError(f"{self.path}: expected a safetensors file: {error}") from None


@dataclass(frozen=True)
class InMemory:
    """A tensor in memory, to be compared as one in a file."""

    tensor: Tensor

    def chunks(self) -> Iterator[tuple[int, Tensor]]:
        yield 0, self.tensor.detach().cpu()


def have_same_rows(a: Stored, b: Stored) -> bool:
    """Whether two hold the same rows: of two dtypes, as the narrower one rounds the other's."""
    if a.shape != b.shape or None in (a.dtype, b.dtype):
        return False
    tensor = b.read()
    return find_differing_rows(a, lambda start, stop: tensor[start:stop]) is None


@dataclass(frozen=True)
class OwnRows:
    """Rows that differ, of a tensor of ``of``: indices (n,), ascending, and values (n, ...)."""

    indices: Tensor
    values: Tensor
    of: int

    @property
    def added(self) -> bool:
        """Whether they are the last ones, but not all: as a larger vocabulary's new ones."""
        return 0 < int(self.indices[0]) == self.of - len(self.indices)

    def is_same(self, other: OwnRows | None) -> bool:
        """Whether the other's are the same rows with the same bits."""
        return (
            other is not None
            and torch.equal(self.indices, other.indices)
            and has_same_bits(self.values, other.values)
        )


def find_differing_rows(
    stored: Stored | InMemory, rows_of: Callable[[int, int], Tensor]
) -> OwnRows | None:
    """Finds the rows of ``stored`` that are not the base's, ``rows_of(start, stop)``; or None.

    Rows beyond the base's last differ.

    A row is the base's where it has the same bits, in the base's dtype or in the file's. So it is
    where it has the bits of the base's row rounded to float16 or bfloat16, as after training in a
    half and upcasting: the base then holds the better numbers.
    """
    index, values, count = [], [], 0
    for start, copy in stored.chunks():
        count = start + len(copy)
        base = rows_of(start, count).detach().cpu()
        is_other = torch.ones(len(copy), dtype=torch.bool)  # those that the base does not have
        is_other[: len(base)] = _find_other_rows(copy[: len(base)], base)
        if is_other.any():
            index.append(is_other.nonzero().flatten() + start)
            values.append(copy[is_other])
    return OwnRows(torch.cat(index), torch.cat(values), count) if index else None


def has_same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are of one dtype and shape and have the same bits."""
    return a.dtype == b.dtype and torch.equal(_view_bits(a), _view_bits(b))


def _view_bits(t: Tensor) -> Tensor:
    """Views numbers as integers, by which zeros of either sign differ and NaN equals itself."""
    return t.contiguous().view(_INTEGERS[t.element_size()])


def _find_other_rows(copy: Tensor, base: Tensor) -> Tensor:
    """Tells for each row of (n, ...) whether it is another than the base's."""
    other = _find_unequal_rows(copy.to(base.dtype), base)
    for dtype in (copy.dtype, *_HALVES):
        if not other.any():
            break
        other &= _find_unequal_rows(copy, base.to(dtype).to(copy.dtype))
    return other


def _find_unequal_rows(a: Tensor, b: Tensor) -> Tensor:
    differs = _view_bits(a) != _view_bits(b)
    return differs.flatten(1).any(1) if differs.dim() > 1 else differs
