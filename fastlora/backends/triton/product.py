"""One LoRA product, forward or backward for x, along any of the paths to it.

``y = x @ w + s * keep * (h @ b) + biases`` with ``h = dropout(x) @ a.T``; see ``one_pass`` for what
the two directions put in. The paths: ``one_pass``, one kernel; ``two_pass``, shrink and then a
product with the rank step inside; ``overlapped``, the same two launched so that they run beside
each other; ``library``, shrink, expand into y, and the library's product accumulated onto it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastlora.kernels.choose import choice
from fastlora.kernels.choose.choice import config_of
from fastlora.kernels.choose.ledger import Problem
from fastlora.kernels.linear.expand import expand
from fastlora.kernels.linear.gemm import fits_tma, gemm
from fastlora.kernels.linear.one_pass import one_pass
from fastlora.kernels.linear.shrink import shrink
from fastlora.kernels.tile.launch import Dropout, arch_of, by_columns, programs_of
from fastlora.kernels.tile.numerics import precise

# Rows that a batch-invariant product's config is chosen for: a decode step's tiles would starve a
# prefill, a prefill's waste half of their rows in decoding. Unmeasured.
INVARIANT_ROWS = 64


@dataclass(frozen=True)
class Product:
    """x (M, K), w (K, N) or None to add to y, a (R, K), b (R, N); fills y (M, N) and h (M, R)."""

    x: Tensor
    w: Tensor | None
    a: Tensor
    b: Tensor
    y: Tensor
    h: Tensor
    scaling: float
    bias: Tensor | None = None
    lora_bias: Tensor | None = None
    drop: Dropout | None = None
    drops_x: bool = True  # else what was dropped in forward is dropped from y
    invariant: bool = False  # a row's bits must not follow from the number of rows

    @property
    def problem(self) -> Problem:
        (M, K), N, R = self.x.shape, self.y.shape[1], self.a.shape[0]
        # A row is summed in the order of its config's steps, and those follow M.
        M = INVARIANT_ROWS if self.invariant else M
        masked = "" if self.drop is None else "x" if self.drops_x else "y"
        sizes = {"size": self.x.itemsize, "lora_size": self.a.itemsize}
        how = {"masked": masked, "precise": precise(self.x.dtype)}
        return Problem(M, K, N, R, weight=self.w is not None, **how, **sizes)

    @property
    def first(self) -> bool:
        """Whether the rank step must come before the K loop: see ``gemm``."""
        masked = self.drop is not None and not self.drops_x
        return masked or self.x.dtype == torch.float16

    def config(self, kernel: str):
        return config_of(kernel, self.problem, self.x.dtype, self.x.device)


def run(product: Product, op: str, path: str | None = None) -> None:
    """Computes the product along ``path``, by default the one that ``choice`` says."""
    p = product
    if p.invariant:
        path = "two_pass"
    if path is None:
        path = choice.path_of(op, p.problem, p.x.dtype, p.a.dtype, p.first, p.x.device)
    elif not choice.possible(path, p.problem, arch_of(p.x.device), p.first):
        raise ValueError(f"path: {path!r} cannot run this product ({p.problem})")
    if p.y.numel() == 0 and p.h.numel() == 0:
        return
    _RUN[path](p)


def _one_pass(p: Product) -> None:
    one_pass(
        p.x, p.w, p.a, p.b, p.y, p.h, p.scaling, p.config("one_pass"),
        bias=p.bias, lora_bias=p.lora_bias, drop=p.drop, drops_x=p.drops_x,
    )  # fmt: skip


def _two_pass(p: Product, overlap: bool = False) -> None:
    if p.w is None:
        _shrink(p)
        _expand(p, add=True)
        return
    scaled = None if p.first else torch.empty_like(p.h)
    _shrink(p, scaled, overlap)
    # Descriptors need an alignment that one batch may have and another not.
    tma = arch_of(p.x.device) >= 90 and fits_tma(p.x, p.w, p.y) and not p.invariant
    gemm(
        p.x, p.w, p.y, p.h if scaled is None else scaled, p.b, p.scaling,
        p.config("gemm_tma" if tma else "gemm"),
        tma=tma, programs=programs_of(p.x.device), first=p.first, bias=p.bias,
        lora_bias=p.lora_bias, drop=None if p.drops_x else p.drop, overlap=overlap,
    )  # fmt: skip


def _library(p: Product) -> None:
    _shrink(p)
    _expand(p, add=False)
    p.y.addmm_(by_columns(p.x), p.w)


def _shrink(p: Product, scaled: Tensor | None = None, overlap: bool = False) -> None:
    shrink(
        p.x, p.a, p.h, p.config("shrink_beside" if overlap else "shrink"),
        scaled=scaled, factor=p.scaling, drop=p.drop if p.drops_x else None, overlap=overlap,
    )  # fmt: skip


def _expand(p: Product, *, add: bool) -> None:
    expand(
        p.y, p.h, p.b, p.scaling, p.config("expand"), add=add,
        bias=p.bias, lora_bias=p.lora_bias, drop=None if p.drops_x else p.drop,
    )  # fmt: skip


_RUN = {
    "one_pass": _one_pass,
    "two_pass": _two_pass,
    "overlapped": lambda p: _two_pass(p, overlap=True),
    "library": _library,
}
