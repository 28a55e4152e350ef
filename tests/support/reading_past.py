"""A torch whose bfloat16 products read past rows, as oneDNN's do under AMX."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastlora.backends.torch.products import STEP
from tests.support.helpers import run_inside

# Where each product has its left operand; the right one comes next.
_PRODUCTS = {"mm": 0, "addmm": 1, "addmm_": 1}


class ReadsPastRows(TorchDispatchMode):
    """NaN and infinity behind a row of the left operand spoil the row's products."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastlora":
            return run_inside(self, func, args)
        y = func(*args, **(kwargs or {}))
        at = _PRODUCTS.get(func.overloadpacket.__name__)
        if at is not None and y.dtype == torch.bfloat16:
            _spoil(y, *args[at : at + 2])
        return y


def _spoil(y: Tensor, a: Tensor, b: Tensor) -> None:
    if y.stride(0) == 1 != y.stride(1):
        return _spoil(y.T, b.T, a.T)
    M, K = a.shape
    columns = K > 1 and a.stride(0) == 1 and a.stride(1) >= M
    past = columns_read(K) - K
    if M < 2 or columns or past == 0:
        return None
    if a.stride(1) != 1 and K > 1:  # the library copies those first
        a = a.contiguous()
    behind = a.as_strided((M - 1, past), (a.stride(0), 1), a.storage_offset() + K)
    y[:-1][~behind.isfinite().all(1)] = torch.nan
    return None


def columns_read(K: int) -> int:
    """ceil(K / 32) equal steps of an even number of columns."""
    steps = -(-K // STEP)
    return steps * 2 * -(-K // (2 * steps)) if K else 0
