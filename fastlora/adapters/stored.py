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
        with self._opened() as file:
            return tuple(file.get_slice(self.key).get_shape())

    @property
    def dtype(self) -> torch.dtype | None:
        """None of what is no float."""
        with self._opened() as file:
            return CODES.get(file.get_slice(self.key).get_dtype())

    def read(self) -> Tensor:
        """All of it, on the CPU."""
        with self._opened() as file:
            return file.get_tensor(self.key)

    def chunks(self) -> Iterator[tuple[int, Tensor]]:
        """Its rows in order, some at a time, each time with the first one's number."""
        with self._opened() as file:
            part = file.get_slice(self.key)
            rows, *rest = part.get_shape()
            step = max(1, _CHUNK // max(1, 8 * torch.Size(rest).numel()))
            for start in range(0, rows, step):
                yield start, part[start : min(rows, start + step)]

    def _opened(self) -> safe_open:
        try:
            return safe_open(self.path, framework="pt")
        except SafetensorError as error:
            raise ValueError(f"{self.path}: expected a safetensors file: {error}") from None


@dataclass(frozen=True)
class Held:
    """A tensor in memory, to be compared as one in a file."""

    tensor: Tensor

    def chunks(self) -> Iterator[tuple[int, Tensor]]:
        yield 0, self.tensor.detach().cpu()


def agree(a: Stored, b: Stored) -> bool:
    """Whether two hold the same rows: of two dtypes, as the narrower one rounds the other's."""
    if a.shape != b.shape or None in (a.dtype, b.dtype):
        return False
    tensor = b.read()
    return differing(a, lambda start, stop: tensor[start:stop]) is None


@dataclass(frozen=True)
class Rows:
    """Rows of a tensor of ``of`` rows: their indices (n,), ascending, and their values (n, ...)."""

    indices: Tensor
    values: Tensor
    of: int

    @property
    def added(self) -> bool:
        """Whether they are the last ones, but not all: as a larger vocabulary's new ones."""
        return 0 < int(self.indices[0]) == self.of - len(self.indices)

    def same(self, other: Rows | None) -> bool:
        """Whether the other's are the same rows with the same bits."""
        return (
            other is not None
            and torch.equal(self.indices, other.indices)
            and same(self.values, other.values)
        )


def differing(stored: Stored | Held, rows_of: Callable[[int, int], Tensor]) -> Rows | None:
    """The rows of ``stored`` that are others than the base's, ``rows_of(start, stop)``; or None.

    Those that the base does not have are.

    A row is the base's where it has its bits, in the base's dtype or in the file's; also where it
    has those that rounding to float16 or bfloat16 leaves of the base's, as where the model was
    trained in a half and upcast: it then tells nothing that the base does not tell better.
    """
    index, values, count = [], [], 0
    for start, copy in stored.chunks():
        count = start + len(copy)
        base = rows_of(start, count).detach().cpu()
        found = torch.ones(len(copy), dtype=torch.bool)  # those that the base does not have
        found[: len(base)] = _others(copy[: len(base)], base)
        if found.any():
            index.append(found.nonzero().flatten() + start)
            values.append(copy[found])
    return Rows(torch.cat(index), torch.cat(values), count) if index else None


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are of one dtype and shape and have the same bits."""
    return a.dtype == b.dtype and torch.equal(_bits(a), _bits(b))


def _bits(t: Tensor) -> Tensor:
    """As integers, by which zeros of either sign differ and NaN does not from itself."""
    return t.contiguous().view(_INTEGERS[t.element_size()])


def _others(copy: Tensor, base: Tensor) -> Tensor:
    """Of each row of (n, ...), whether it is another than the base's."""
    other = _unequal(copy.to(base.dtype), base)
    for dtype in (copy.dtype, *_HALVES):
        if not other.any():
            break
        other &= _unequal(copy, base.to(dtype).to(copy.dtype))
    return other


def _unequal(a: Tensor, b: Tensor) -> Tensor:
    found = _bits(a) != _bits(b)
    return found.flatten(1).any(1) if found.dim() > 1 else found
