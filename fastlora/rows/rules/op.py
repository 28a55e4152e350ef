"""An op that has run, as its rule sees it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from torch import Tensor

from fastlora.rows.marks import Marks
from fastlora.rows.owners import Owners

OpOwners = Owners | None | list[Owners | None]
Rule = Callable[["Op"], OpOwners]


class Op:
    """An op that has run: its arguments by name, its results, and whose they are."""

    def __init__(
        self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], marks: Marks
    ) -> None:
        self.func, self.args, self.kwargs, self.marks = func, args, kwargs, marks
        self.out: Any = None
        # Whether a value of the batch decided on somebody's rows: what is found holds this once.
        self.by_value = False

    def arg(self, name: str) -> Any:
        i, default = _read_parameters(self.func).get(name, (len(self.args), None))
        return self.args[i] if i < len(self.args) else self.kwargs.get(name, default)

    def owners_of(self, value: Any) -> Owners | None:
        return self.marks.get(value) if isinstance(value, Tensor) else None

    def read_values(self, t: Tensor) -> Any:
        """Reads a tensor of indices or a mask, whose values decide on rows."""
        self.by_value = True
        return t.detach().cpu().numpy()

    @property
    def outs(self) -> list[Tensor]:
        return list_tensors(self.out)


def assign(rule: Rule, names: str, library: str = "aten") -> dict[str, Rule]:
    """Gives each of the ops that ``names`` lists the one rule."""
    return dict.fromkeys((f"{library}::{name}" for name in names.split()), rule)


@cache
def _read_parameters(func: Any) -> dict[str, tuple[int, Any]]:
    """Reads {name: (position, default)}."""
    return {a.name: (i, a.default_value) for i, a in enumerate(func._schema.arguments)}


def list_tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    tensors: list[Tensor] = []
    if isinstance(value, (list, tuple)):
        for part in value:
            if isinstance(part, Tensor):
                tensors.append(part)
            elif isinstance(part, (list, tuple)):
                tensors += list_tensors(part)
    return tensors
