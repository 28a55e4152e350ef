"""Errors about one of several weights: which one, and its name.

Loops over weights say with ``at`` which one an error is about, and whoever calls them with a part
of its weights says with ``among`` which those are. The outermost caller, which has names for them,
puts the name before the message with ``named``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

NOT_FINITE = "adapters: merging gives values that are not finite; the weight is unchanged"
NOT_MERGED = (
    "weight: it is not the one that this receipt's merge left behind (edited since, or "
    "another layer's); nothing was changed"
)
# What calls about weights raise, of which some are about one of them.
_RAISED = (TypeError, ValueError, RuntimeError)
_Error = TypeVar("_Error", bound=BaseException)


@contextmanager
def at(index: int) -> Iterator[None]:
    """An error in here is about weight ``index`` of the call."""
    try:
        yield
    except _RAISED as error:
        set_index(error, index)
        raise


@contextmanager
def among(indices: Sequence[int]) -> Iterator[None]:
    """An error in here about the j-th of some weights is about weight ``indices[j]`` of all."""
    try:
        yield
    except _RAISED as error:
        index = index_of(error)
        set_index(error, None if index is None else indices[index])
        raise


@contextmanager
def named(names: Sequence[str]) -> Iterator[None]:
    """An error about a weight begins with its name, if it has one; with one name all errors do."""
    try:
        yield
    except _RAISED as error:
        index = 0 if len(names) == 1 else index_of(error)
        if index is None or not names[index]:
            raise
        raise set_index(type(error)(f"{names[index]}: {error}"), index) from error


def index_of(error: BaseException) -> int | None:
    """Which weight of the call an error is about; None where it is about none in particular."""
    return vars(error).get("index")


def set_index(error: _Error, index: int | None) -> _Error:
    """Notes which weight of the call an error is about, as its ``index``; returns the error."""
    if index is not None:
        vars(error)["index"] = index
    return error
