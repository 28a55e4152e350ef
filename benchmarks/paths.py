"""Backends and their paths as providers: each by itself, whatever would be chosen."""

from __future__ import annotations

from benchmarks.work import Absent, Builder, Call, Case, Operands, Outputs
from fastlora import availability, dispatch, use_backend


def on(backend: str, fastlora: Builder, case: Case, o: Operands) -> Call:
    """What the provider ``fastlora`` calls, on one backend alone."""
    reason = availability.unusable(backend)
    if reason is not None:
        raise Absent(reason)
    with use_backend(backend):
        call = fastlora(case, o)

    def on_the_backend() -> Outputs:
        try:
            with use_backend(backend), dispatch.not_handed_on():
                return call()
        except dispatch.HandedOn as error:
            raise Absent(str(error)) from error

    return on_the_backend


def along(path: str, fastlora: Builder, case: Case, o: Operands) -> Call:
    """What the provider ``fastlora`` calls, with its Triton kernels along one path."""
    try:
        from fastlora.kernels.choice import use_path
    except ImportError as error:
        raise Absent(f"triton cannot be imported: {error}") from error
    call = fastlora(case, o)

    def along_the_path() -> Outputs:
        with use_backend("triton"), use_path(path):
            return call()

    return along_the_path
