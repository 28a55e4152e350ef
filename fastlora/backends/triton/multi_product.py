"""One product whose rows belong to different adapters, along any of the paths to it.

``y[t] = x[t] @ w + s_t * (x[t] @ a.T) @ b + bias`` with a and b of row t's own adapter. The paths:
``decode``, shrink and then the product, which takes every row's b by itself; ``prefill``, shrink
and then the product, whose tiles walk their adapters; both again ``_beside``, launched so that the
two run beside each other; ``library``, the library's product, shrink, and expand onto it. Without w
there is ``added``: shrink, expand.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastlora.backends.triton.product import INVARIANT_ROWS
from fastlora.kernels.choose import choice
from fastlora.kernels.choose.choice import config_of
from fastlora.kernels.choose.ledger import Problem
from fastlora.kernels.linear.gemm import fits_tma
from fastlora.kernels.multi.batch import KernelAdapters, KernelRows
from fastlora.kernels.multi.decode import multi_decode
from fastlora.kernels.multi.expand import multi_expand
from fastlora.kernels.multi.gemm import ends_fit, multi_gemm
from fastlora.kernels.multi.shrink import multi_shrink, parts_of
from fastlora.kernels.tile.launch import arch_of, by_columns, programs_of
from fastlora.kernels.tile.numerics import precise

# Rows up to which a row's sum over K is split among programs, whose parts of h then pass through
# memory once for every tile of columns: 64 rows of rank 64 in four parts are 64 KiB. By arithmetic.
SPLIT_ROWS = 64


@dataclass(frozen=True)
class MultiProduct:
    """x (T, K), w (K, N) or None to add to y; fills y (T, N) and h (T, C * R), of unit columns.

    ends: of the C slices of columns, (N,) where there is one.
    """

    x: Tensor
    w: Tensor | None
    adapters: KernelAdapters
    rows: KernelRows
    y: Tensor
    h: Tensor
    ends: tuple[int, ...]
    bias: Tensor | None = None
    invariant: bool = False

    @property
    def problem(self) -> Problem:
        (T, K), N = self.x.shape, self.y.shape[1]
        # A row is summed in the order of its config's steps, and those follow T.
        T = INVARIANT_ROWS if self.invariant else T
        sizes = {"size": self.x.itemsize, "lora_size": self.adapters.a.itemsize}
        how = {"precise": precise(self.x.dtype)}
        how |= {"weight": self.w is not None, "slots": self.adapters.S}
        return Problem(T, K, N, self.adapters.R, **how, **sizes)

    @property
    def first(self) -> bool:
        """Whether the adapters' steps come before the K loop in ``prefill``: see ``multi_gemm``."""
        return self.x.dtype == torch.float16

    def config(self, kernel: str):
        return config_of(kernel, self.problem, self.x.dtype, self.x.device)


def run(product: MultiProduct, op: str, path: str | None = None) -> None:
    """Computes the product along ``path``, by default the one that ``choice`` says."""
    p = product
    if p.y.numel() == 0 and p.h.numel() == 0:
        return
    if p.invariant and p.w is not None:
        path = "decode"
    if path is None:
        kinds = p.x.dtype, p.adapters.a.dtype
        path = choice.path_of(op, p.problem, *kinds, p.first, p.x.device)
    elif not choice.possible(path, p.problem, arch_of(p.x.device), p.first):
        raise ValueError(f"path: {path!r} cannot run this product ({p.problem})")
    _RUN[path](p)


def _decode(p: MultiProduct, beside: bool = False) -> None:
    h = _shrunk(p, beside)
    multi_decode(
        p.x, p.w, p.y, h, p.adapters, p.rows, p.ends, p.config("multi_decode"),
        out=p.h, bias=p.bias, overlap=beside,
    )  # fmt: skip


def _prefill(p: MultiProduct, beside: bool = False) -> None:
    scaled = None if p.first else torch.empty_like(p.h)
    multi_shrink(
        p.x, p.adapters, p.rows, p.h, p.config("multi_shrink"),
        slices=len(p.ends), scaled=scaled, overlap=beside,
    )  # fmt: skip
    # Descriptors feed tensor cores: without those both would want the registers.
    tma = arch_of(p.x.device) >= 90 and fits_tma(p.x, p.w, p.y) and not precise(p.x.dtype)
    config = p.config("multi_gemm_tma" if tma else "multi_gemm")
    if tma and not ends_fit(p.ends, config.BN):
        tma, config = False, p.config("multi_gemm")
    multi_gemm(
        p.x, p.w, p.y, p.h if scaled is None else scaled, p.adapters, p.rows, p.ends, config,
        tma=tma, programs=programs_of(p.x.device), first=p.first, bias=p.bias, overlap=beside,
    )  # fmt: skip


def _library(p: MultiProduct) -> None:
    if p.bias is None:
        torch.mm(by_columns(p.x), p.w, out=p.y)
    else:
        torch.addmm(p.bias, by_columns(p.x), p.w, out=p.y)
    _added(p)


def _added(p: MultiProduct) -> None:
    h = _shrunk(p)
    multi_expand(p.y, h, p.adapters, p.rows, p.ends, p.config("multi_expand"), out=p.h)


def _shrunk(p: MultiProduct, beside: bool = False) -> Tensor:
    """h, or parts of it where there are few rows."""
    (T, K), h = p.x.shape, p.h
    if T <= SPLIT_ROWS and parts_of(K) > 1 and h.numel():
        h = h.new_empty(parts_of(K), *h.shape, dtype=torch.float32)
    config = p.config("multi_shrink")
    multi_shrink(p.x, p.adapters, p.rows, h, config, slices=len(p.ends), overlap=beside)
    return h


_RUN = {
    "decode": _decode,
    "decode_beside": lambda p: _decode(p, beside=True),
    "prefill": _prefill,
    "prefill_beside": lambda p: _prefill(p, beside=True),
    "library": _library,
    "added": _added,
}
