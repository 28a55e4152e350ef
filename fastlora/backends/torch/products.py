"""Products of torch's library in which no row of the left operand sees what lies behind it.

Under AMX oneDNN (3.12, in torch 2.13) splits K into ceil(K / 32) equal steps of an even number of
columns, and reads bfloat16 rows to the end of the last step: past K, so into the gap of a slice or
into the next row. Zeros meet that on the other side, but NaN and infinity outlive zeros. Such an
operand is copied here to rows with zeros behind them, at an N-th of the product's work. Other
machines, dtypes and every K that is a multiple of 32 pay a comparison or two.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from fastlora.backends.dtypes import HALVES

# Columns of a tile register's row: a row is never read past the next multiple of it.
STEP = 32


# Each looks at K before it calls anything: a small layer's call would feel it.
def mm(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """``a @ b`` of matrices (M, K) and (K, N)."""
    if a.shape[1] % STEP and a.dtype in HALVES:
        a, b = _isolated(a, b, out)
    return torch.mm(a, b) if out is None else torch.mm(a, b, out=out)


def addmm_(y: Tensor, a: Tensor, b: Tensor, alpha: float = 1.0) -> Tensor:
    """``y += alpha * (a @ b)`` in place, y (M, N)."""
    if a.shape[1] % STEP and a.dtype in HALVES:
        a, b = _isolated(a, b, y)
    return y.addmm_(a, b, alpha=alpha)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ weight.T + bias`` of x (M, K) and weight (N, K)."""
    if x.shape[1] % STEP and x.dtype in HALVES:
        x = isolate_rows(x)
    return torch.nn.functional.linear(x, weight, bias)


def isolate_rows(t: Tensor) -> Tensor:
    """t (M, K), or where the library would read past its rows a copy with zeros behind them."""
    if ends_with_a_step(t.shape[1]) or t.dtype not in HALVES or t.device.type != "cpu":
        return t
    M, K = t.shape
    # Columns one after the other are read column by column; anything else is taken by rows.
    columns = K > 1 and t.stride(0) == 1 and t.stride(1) >= M
    if M < 2 or columns or not reads_past_rows(t.dtype):
        return t
    padded = t.new_empty(M, -(-K // STEP) * STEP)
    padded[:, K:] = 0
    padded[:, :K] = t
    return padded[:, :K]


def ends_with_a_step(K: int) -> bool:
    """Whether rows of K columns are never read past; some that are not may say False too."""
    return K % STEP == 0 or (K < STEP and K % 2 == 0)


@functools.cache
def reads_past_rows(dtype: torch.dtype) -> bool:
    """Whether this machine's torch does so, found by trying: NaN behind rows comes through."""
    for K in (STEP + 1, STEP + 2, 2 * STEP + 4):
        wide = torch.full((40, 2 * K), torch.nan, dtype=dtype)
        wide[:, :K] = 1
        with torch.autocast("cpu", enabled=False), torch.no_grad():
            if not torch.mm(wide[:, :K], wide.new_ones(K, 64)).isfinite().all():
                return True
    return False


def _isolated(a: Tensor, b: Tensor, out: Tensor | None) -> tuple[Tensor, Tensor]:
    """a and b as the product reads them: of a transposed result b is the left operand."""
    if ends_with_a_step(a.shape[1]):
        return a, b
    if out is not None and out.stride(0) == 1 != out.stride(1):
        b = isolate_rows(b.T).T
    return isolate_rows(a), b
