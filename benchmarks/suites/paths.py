"""Backends and their paths as providers: each by itself, whatever would be chosen."""

from __future__ import annotations

from unittest.mock import patch

from benchmarks.harness.case import Absent, Builder, Call, Case, Operands, Outputs
from fastlora import use_backend
from fastlora.backends.cpu import choices
from fastlora.ops import availability
from fastlora.ops.run import Refused, strictly


def run_on(backend: str, fastlora: Builder, case: Case, o: Operands) -> Call:
    """Prepares the call of provider ``fastlora`` on one backend alone."""
    reason = availability.unusable(backend)
    if reason is not None:
        raise Absent(reason)
    with use_backend(backend):
        call = fastlora(case, o)

    def on_the_backend() -> Outputs:
        try:
            with use_backend(backend), strictly():
                return call()
        except Refused as error:
            raise Absent(str(error)) from error

    return on_the_backend


def run_with_base(natively: bool, fastlora: Builder, case: Case, o: Operands) -> Call:
    """Prepares ``fastlora``'s call on a CPU, the base in the native kernel or by torch."""
    reason = availability.unusable("cpu")
    if reason is not None:
        raise Absent(reason)
    form = choices.Choice(case.shape["M"] if natively else 0)
    with use_backend("cpu"):
        call = fastlora(case, o)

    def chosen() -> Outputs:
        with use_backend("cpu"), patch.object(choices, "forced", form):
            return call()

    return chosen


def run_along(path: str, fastlora: Builder, case: Case, o: Operands) -> Call:
    """Prepares ``fastlora``'s call with its Triton kernels along one path."""
    try:
        from fastlora.kernels.choose.choice import NoSuchPath, use_path
    except ImportError as error:
        raise Absent(f"triton cannot be imported: {error}") from error
    call = fastlora(case, o)

    def along_the_path() -> Outputs:
        try:
            with use_backend("triton"), use_path(path, strictly=True):
                return call()
        except NoSuchPath as error:
            raise Absent(str(error)) from error

    return along_the_path
