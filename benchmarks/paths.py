"""The Triton kernels' paths as providers: each along its own, whatever would be chosen."""

from __future__ import annotations

from benchmarks.work import Absent, Builder, Call, Case, Operands, Outputs
from fastlora import use_backend


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
