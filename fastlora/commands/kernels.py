"""The Triton kernels and what chooses among them, as ``check``, ``tune`` and ``info`` use them.

Importing it needs triton, so commands import it inside functions. Type checks leave this file out:
they do not know ``fastlora.kernels``, which lies in kernels/ until it is installed.
"""

from typing import TYPE_CHECKING, Any

from fastlora.backends.triton import linear as linear_ops
from fastlora.kernels.choose import choice, ledger, records
from fastlora.kernels.linear import expand, gemm, gradient, one_pass, shrink
from fastlora.kernels.tile import configs, fitting, launch

if TYPE_CHECKING:

    def __getattr__(name: str) -> Any: ...


__all__ = [
    "choice",
    "configs",
    "expand",
    "fitting",
    "gemm",
    "gradient",
    "launch",
    "ledger",
    "linear_ops",
    "one_pass",
    "records",
    "shrink",
]
