"""One forward of a batch: which batch rows came in, and where each layer sees them."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from torch import Tensor, nn

from fastlora.rows.owners import NOBODY, Owners, join_along, spread_along
from fastlora.rows.statements import Statement
from fastlora.rows.tracing import Trace


class Place(NamedTuple):
    """A place where all rows that came in are in order, each ``copies`` times, along ``dim``."""

    dim: int
    copies: int


class Frame:
    """One forward. rows: batch rows of the rows in it. trace: None where places are known."""

    def __init__(
        self,
        watch: Any,
        module: object,
        rows: tuple[int, ...],
        trace: Trace | None = None,
        places: dict[int, Place] | None = None,
    ) -> None:
        self.watch = watch
        self.module, self.rows, self.trace = module, rows, trace
        self.places: dict[int, Place] = {} if places is None else places
        # Whether the rows are the batch's in order, each as many times.
        self.count = len(set(rows))
        copies = len(rows) // max(self.count, 1)
        self.regular = rows == tuple(i for i in range(self.count) for _ in range(copies))
        # Whether every layer sees just those rows, first: what compiled code takes for granted.
        self.plain = trace is None and all(place == (0, 1) for place in self.places.values())
        # Whether all that was found can be found again without following it.
        self.is_repeatable = True
        # What layers share: the groups of their rows and scales, by the inputs' shapes.
        self.groups_and_scales: dict[Any, Any] = {}
        self.depth = 0
        self.outer: Frame | None = None
        # Whether it ends with the first forward in it.
        self.once = False
        self.stated: list[tuple[Statement, tuple[int, ...]]] = []

    def get_name(self, layer: nn.Module) -> str:
        return self.watch.get_name(layer)

    def nest_in(self, outer: Frame) -> Frame:
        """Makes it a part of a call that is followed whole."""
        self.outer = outer
        return self

    def close(self, output: object = None) -> None:
        """Ends the frame, at the end of its module."""

    def find_rows(self, layer: nn.Module, x: Tensor) -> Place | Owners | str:
        """Finds the batch in x (..., K): its place, or an owner for each row, or why nobody knows.

        Owners have x's dimensions but the last, of size 1 where they do not change.
        """
        if self.trace is None:
            place = self.places.get(id(layer))
            if place is None or x.shape[place.dim] != len(self.rows) * place.copies:
                self.watch.verdicts.distrust(self.places)
                return "it sees other rows than when this was looked at; from now on it always is"
            return place
        rows = self._trace_rows(x)
        is_same = isinstance(rows, Place) and self.places.setdefault(id(layer), rows) == rows
        self.is_repeatable = self.is_repeatable and is_same
        return rows

    def _trace_rows(self, x: Tensor) -> Place | Owners | str:
        assert self.trace is not None
        o = join_along(self.trace.owners_of(x), [-1])
        o = None if o is None else o.reshape(o.shape[:-1])
        if o is None or not o.ndim or (o < 0).any():
            for each in () if o is None else _iterate_slices(o, x):
                return self._shorten(each, x)
            return self._find_stated(x, o)
        return self._shorten(o, x)

    def _shorten(self, o: Owners, x: Tensor) -> Place | Owners:
        """Returns the place instead of the owners, if they are the batch in order."""
        count, size = len(self.rows), o.size
        for dim, n in enumerate(o.shape):
            length = x.shape[dim]
            if n != size or (size == 1 and length % count) or length < count or length % count:
                continue
            copies = length // count
            rows = np.repeat(np.asarray(self.rows, np.int32), copies)
            if (np.broadcast_to(o.reshape(-1), (length,)) == rows).all():
                return Place(dim, copies)
        return o

    def _find_stated(self, x: Tensor, o: Owners | None) -> Place | Owners | str:
        model_statement = self.watch.routing.stated.get(id(self.module))
        for statement, rows in reversed(self.stated):
            # Of the model it says how it is called, and of its layers only that the batch is first.
            if statement.dim and statement is model_statement:
                continue
            if x.dim() > statement.dim + 1 and x.shape[statement.dim] == len(rows):
                return self._shorten(spread_along(statement.dim, rows, x.dim() - 1), x)
        if o is None or bool((o == NOBODY).any()):
            return "its input comes from none of the batch's rows"
        return "whose its input's rows are was lost on the way to it"


def _iterate_slices(o: Owners, x: Tensor) -> Any:
    """Yields owners of whole slices: constants within a row's slice are that row's."""
    for dim in range(o.ndim):
        # Along a dimension of no rows there are no slices of theirs.
        if o.shape[dim] == 1 and x.shape[dim] > 1:
            continue
        joined = join_along(o, [d for d in range(o.ndim) if d != dim])
        if joined is not None and not (joined < 0).any():
            yield joined
