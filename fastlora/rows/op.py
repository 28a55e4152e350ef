"""An op that has run, as its rule sees it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from torch import Tensor

from fastlora.rows.marks import Marks
from fastlora.rows.owners import Owners

Found = Owners | None | list[Owners | None]
Rule = Callable[["Op"], Found]


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
        i, default = _parameters(self.func).get(name, (len(self.args), None))
        return self.args[i] if i < len(self.args) else self.kwargs.get(name, default)

    def own(self, value: Any) -> Owners | None:
        return self.marks.get(value) if isinstance(value, Tensor) else None

    def values(self, t: Tensor) -> Any:
        """What a tensor of indices or a mask holds, since rows go by it."""
        self.by_value = True
        return t.detach().cpu().numpy()

    @property
    def outs(self) -> list[Tensor]:
        return tensors_in(self.out)


@cache
def _parameters(func: Any) -> dict[str, tuple[int, Any]]:
    """{name: (position, default)}."""
    return {a.name: (i, a.default_value) for i, a in enumerate(func._schema.arguments)}


def tensors_in(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    found: list[Tensor] = []
    if isinstance(value, (list, tuple)):
        for part in value:
            if isinstance(part, Tensor):
                found.append(part)
            elif isinstance(part, (list, tuple)):
                found += tensors_in(part)
    return found
