"""Statements of the caller: which rows a module has, or which dimension is the batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn

from fastlora.inspection.wrappers import strip_wrappers, unwrap


class Statement(NamedTuple):
    """A statement. rows: the batch row of each index of ``dim``; None: the batch, in order."""

    dim: int
    rows: tuple[int, ...] | None = None


def find_modules(model: nn.Module) -> dict[str, nn.Module]:
    return {strip_wrappers(name): module for name, module in unwrap(model).named_modules()}


def check_dims(model: nn.Module, batch_dims: Mapping[str, int] | None) -> dict[str, Statement]:
    """Makes statements of ``batch_dims``; TypeError or ValueError names what does not fit."""
    statements: dict[str, Statement] = {}
    for name, dim in _check_names("batch_dims", model, batch_dims):
        if not isinstance(dim, int) or isinstance(dim, bool) or dim < 0:
            raise ValueError(f"batch_dims[{name!r}]: expected a dimension, 0 or more, got {dim!r}")
        statements[name] = Statement(dim)
    return statements


def check_rows(
    model: nn.Module,
    adapter_rows: Mapping[str, Sequence[int]] | None,
    batch: int,
    dims: Mapping[str, Statement],
) -> dict[str, Statement]:
    """Makes statements of ``adapter_rows``, along a module's dimension in ``dims``, else 0."""
    statements: dict[str, Statement] = {}
    for name, rows in _check_names("adapter_rows", model, adapter_rows):
        if isinstance(rows, str) or not isinstance(rows, Sequence):
            raise TypeError(f"adapter_rows[{name!r}]: expected a list of rows, got {rows!r}")
        for row in rows:
            if not isinstance(row, int) or isinstance(row, bool) or not 0 <= row < batch:
                raise ValueError(
                    f"adapter_rows[{name!r}]: expected rows of the batch, 0 to {batch - 1}, "
                    f"got {row!r}"
                )
        dim = dims[name].dim if name in dims else 0
        statements[name] = Statement(dim, tuple(rows))
    return statements


def _check_names(argument: str, model: nn.Module, value: Any) -> list[tuple[str, Any]]:
    if value is None:
        return []
    if not isinstance(value, Mapping):
        raise TypeError(f"{argument}: expected {{name of a module: …}}, got {value!r}")
    names = find_modules(model)
    for name in value:
        if name not in names:
            raise ValueError(f"{argument}: expected names of the model's modules, got {name!r}")
    return list(value.items())
