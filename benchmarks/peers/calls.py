"""Calls of other libraries, and reasons why an installed version has none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from benchmarks.harness.case import Absent, Builder, Call, Case, Operands
from benchmarks.harness.machine import find_version

# Begins the schema in torch's error for arguments that do not fit an op.
_SCHEMA = "Declaration: "


@contextmanager
def importing(library: str) -> Iterator[None]:
    """Makes the library absent on any error within: some look for a GPU, or patch others."""
    try:
        yield
    except Exception as error:
        raise Absent(
            f"{_name_version(library)} cannot be imported: {_describe_error(error)}"
        ) from error


@contextmanager
def calling(library: str) -> Iterator[None]:
    """Makes the library absent where its version lacks a name or does not take the arguments."""
    try:
        yield
    except (AttributeError, TypeError) as error:
        raise Absent(
            f"{_name_version(library)} is not as expected here: {_describe_error(error)}"
        ) from error
    except RuntimeError as error:
        if _SCHEMA not in str(error):
            raise
        raise Absent(
            f"{_name_version(library)} is not as expected here: {_describe_error(error)}"
        ) from error


def try_call(library: str, builder: Builder, case: Case, o: Operands) -> Call:
    """Returns ``builder``'s call after a first one, which shows whether this version takes it."""
    with calling(library):
        call = builder(case, o)
        call()
    return call


def _name_version(library: str) -> str:
    number = find_version(library)
    return f"{library} {number}" if number else library


def _describe_error(error: Exception) -> str:
    """Describes the error in one line, without the schema that follows."""
    text = str(error).partition(_SCHEMA)[0]
    return f"{type(error).__name__}: {' '.join(text.split())}"
