"""One forward of a batch: whose the rows are that came in, and which of them each layer sees."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from torch import Tensor, nn

from fastlora.rows.owners import NOBODY, Owners, along, over
from fastlora.rows.statements import Statement
from fastlora.rows.tracing import Trace


class Place(NamedTuple):
    """The rows that came in, all of them in order, each ``copies`` times, along ``dim``."""

    dim: int
    copies: int


class Frame:
    """rows: the batch row of each row that came in. trace: None where ``found`` holds already."""

    def __init__(
        self,
        watch: Any,
        module: object,
        rows: tuple[int, ...],
        trace: Trace | None = None,
        found: dict[int, Place] | None = None,
    ) -> None:
        self.watch = watch
        self.module, self.rows, self.trace = module, rows, trace
        self.found: dict[int, Place] = {} if found is None else found
        # Whether the rows are the batch's in order, each as many times.
        self.count = len(set(rows))
        copies = len(rows) // max(self.count, 1)
        self.regular = rows == tuple(i for i in range(self.count) for _ in range(copies))
        # Whether every layer sees just those rows, first: what compiled code takes for granted.
        self.plain = trace is None and all(place == (0, 1) for place in self.found.values())
        # Whether all that was found can be found again without following it.
        self.usual = True
        # What layers share: the groups of their rows and scales, by the inputs' shapes.
        self.made: dict[Any, Any] = {}
        self.depth = 0
        self.outer: Frame | None = None
        # Whether it ends with the first forward in it.
        self.once = False
        self.stated: list[tuple[Statement, tuple[int, ...]]] = []

    def name_of(self, layer: nn.Module) -> str:
        return self.watch.name(layer)

    def within(self, outer: Frame) -> Frame:
        """Part of a call that is followed whole."""
        self.outer = outer
        return self

    def close(self, output: object = None) -> None:
        """At the end of its module."""

    def of(self, layer: nn.Module, x: Tensor) -> Place | Owners | str:
        """Where the batch is in x (..., K), or an owner for each of its rows, or why nobody knows.

        Owners have x's dimensions but the last, of size 1 where they do not change.
        """
        if self.trace is None:
            place = self.found.get(id(layer))
            if place is None or x.shape[place.dim] != len(self.rows) * place.copies:
                self.watch.distrust(self.found)
                return "it sees other rows than when this was looked at; from now on it always is"
            return place
        found = self._seen(x)
        alike = isinstance(found, Place) and self.found.setdefault(id(layer), found) == found
        self.usual = self.usual and alike
        return found

    def _seen(self, x: Tensor) -> Place | Owners | str:
        assert self.trace is not None
        o = over(self.trace.owners(x), [-1])
        o = None if o is None else o.reshape(o.shape[:-1])
        if o is None or not o.ndim or (o < 0).any():
            for each in () if o is None else _by_dimension(o, x):
                return self._placed(each, x)
            return self._as_stated(x, o)
        return self._placed(o, x)

    def _placed(self, o: Owners, x: Tensor) -> Place | Owners:
        """The shorter word for it, if it is the batch in order."""
        count, size = len(self.rows), o.size
        for dim, n in enumerate(o.shape):
            whole = x.shape[dim]
            if n != size or (size == 1 and whole % count) or whole < count or whole % count:
                continue
            copies = whole // count
            rows = np.repeat(np.asarray(self.rows, np.int32), copies)
            if (np.broadcast_to(o.reshape(-1), (whole,)) == rows).all():
                return Place(dim, copies)
        return o

    def _as_stated(self, x: Tensor, o: Owners | None) -> Place | Owners | str:
        of_model = self.watch.routing.stated.get(id(self.module))
        for statement, rows in reversed(self.stated):
            # Of the model it says how it is called, and of its layers only that the batch is first.
            if statement.dim and statement is of_model:
                continue
            if x.dim() > statement.dim + 1 and x.shape[statement.dim] == len(rows):
                return self._placed(along(statement.dim, rows, x.dim() - 1), x)
        if o is None or bool((o == NOBODY).any()):
            return "its input comes from none of the batch's rows"
        return "whose its input's rows are was lost on the way to it"


def _by_dimension(o: Owners, x: Tensor) -> Any:
    """Owners of whole slices: constants within a row's slice are that row's."""
    for dim in range(o.ndim):
        # Along a dimension of no rows there are no slices of theirs.
        if o.shape[dim] == 1 and x.shape[dim] > 1:
            continue
        found = over(o, [d for d in range(o.ndim) if d != dim])
        if found is not None and not (found < 0).any():
            yield found
