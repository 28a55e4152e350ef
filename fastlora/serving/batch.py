"""Which adapter each row of a call's batch has, as the call's arguments say."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from fastlora.config import check_number
from fastlora.modules.routing import Routing
from fastlora.rows.statements import Statement

_INPUTS = ("input_ids", "inputs_embeds", "inputs")


class Batch(Routing, threading.local):
    """The batch that this thread is running."""

    watched = True

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy of the model runs no batch; thread-local state cannot be copied anyway.
        return Batch, (self.outside,)


def count_rows(
    adapter_names: Sequence[str | None],
    adapter_scales: Sequence[float] | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    dims: Mapping[str, Statement],
) -> int:
    """Returns the rows of a call's batch.

    Raises TypeError when the names are no list, ValueError where no input has a batch, and unless
    each row has one name and, if any has, one finite scale.
    """
    if isinstance(adapter_names, str) or not isinstance(adapter_names, Sequence):
        raise TypeError(f"adapter_names: expected a list with a name a row, got {adapter_names!r}")
    rows = _batch_size(args, kwargs, dims)
    for argument, values in (("adapter_names", adapter_names), ("adapter_scales", adapter_scales)):
        if values is not None and len(values) != rows:
            raise ValueError(f"{argument}: expected {rows}, one a row, got {len(values)}")
    for scale in adapter_scales or ():
        check_number("adapter_scales", scale)
    return rows


def _batch_size(
    args: tuple[Any, ...], kwargs: dict[str, Any], dims: Mapping[str, Statement]
) -> int:
    dim = dims[""].dim if "" in dims else 0
    inputs = [kwargs[name] for name in _INPUTS if isinstance(kwargs.get(name), Tensor)]
    for value in (*inputs, *args, *kwargs.values()):
        if isinstance(value, Tensor) and value.dim() > dim:
            return value.shape[dim]
    raise ValueError("inputs: expected a tensor whose first dimension is the batch")
