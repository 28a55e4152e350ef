"""Calls of another library, or why this version of it has none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from benchmarks.harness.machine import version
from benchmarks.harness.work import Absent, Builder, Call, Case, Operands

# What torch says where an op's arguments do not fit it, before the op's own schema.
_SCHEMA = "Declaration: "


@contextmanager
def importing(library: str) -> Iterator[None]:
    """Whatever goes wrong within makes the library absent: some look for a GPU, or patch others."""
    try:
        yield
    except Exception as error:
        raise Absent(f"{_named(library)} cannot be imported: {_said(error)}") from error


@contextmanager
def calling(library: str) -> Iterator[None]:
    """A library is absent whose version wants to be called in another way than within.

    It lacks a name, or does not take the arguments.
    """
    try:
        yield
    except (AttributeError, TypeError) as error:
        raise Absent(f"{_named(library)} is not as expected here: {_said(error)}") from error
    except RuntimeError as error:
        if _SCHEMA not in str(error):
            raise
        raise Absent(f"{_named(library)} is not as expected here: {_said(error)}") from error


def tried(library: str, builder: Builder, case: Case, o: Operands) -> Call:
    """``builder``'s call after a first one, which shows whether this version is called that way."""
    with calling(library):
        call = builder(case, o)
        call()
    return call


def _named(library: str) -> str:
    found = version(library)
    return f"{library} {found}" if found else library


def _said(error: Exception) -> str:
    """In one line, without the schema that follows."""
    said = str(error).partition(_SCHEMA)[0]
    return f"{type(error).__name__}: {' '.join(said.split())}"
