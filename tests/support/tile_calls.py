"""Calls of the CPU kernels with bfloat16 rows, every operand between NaN, and what they leave."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastlora import functional as F
from fastlora.backends import native
from fastlora.backends.cpu import linear as cpu_linear
from fastlora.backends.cpu import multi as cpu_multi
from fastlora.backends.values import Adapters, Rows
from tests.support.helpers import bits, same_bits, signed

BF16 = torch.bfloat16
# The sets whose bfloat16 kernels are made of tiles, those that run here.
TILE_SETS = [] if native.unusable() else [n for n in native.available().split(", ") if "amx" in n]
# Where AddressSanitizer watches, memory ends where the operand ends.
WATCHED = "ASAN_OPTIONS" in os.environ
GAP, GUARD = 3, 0 if WATCHED else 67


class Guarded:
    """Values whose rows lie GAP elements apart, with NaN between and around them."""

    def __init__(self, values: Tensor) -> None:
        *outer, columns = values.shape
        rows, strides = math.prod(outer), [1]
        for size in [columns + GAP, *reversed(outer[1:])]:
            strides.insert(0, strides[0] * size)
        extent = (rows - 1) * (columns + GAP) + columns if values.numel() else 0
        self.layout = (values.shape, strides[-values.dim() :], GUARD)
        self.memory = values.new_full((extent + 2 * GUARD,), math.nan)
        self.values.copy_(values)

    @property
    def values(self) -> Tensor:
        return self.memory.as_strided(*self.layout)

    def only_values_changed(self) -> bool:
        outside = self.memory.clone()
        outside.as_strided(*self.layout).fill_(math.nan)
        return same_bits(outside, torch.full_like(outside, math.nan))


def guarded(t: Tensor | None) -> Tensor | None:
    return None if t is None else Guarded(t).values


@dataclass
class Batch:
    """Rows of several adapters, id -1 for none; y is what is added to where W is None."""

    x: Tensor
    W: Tensor | None
    bias: Tensor | None
    A: Tensor  # (S, R, K)
    B: Tensor  # (S, N, R)
    ids: Tensor
    scalings: Tensor
    y: Tensor
    ranks: Tensor | None = None
    row_scales: Tensor | None = None

    @classmethod
    def of(cls, M: int, K: int, N: int, R: int, S: int = 1, lora_dtype=BF16, **options) -> Batch:
        """As dense calls have them; of one adapter all rows have it."""
        on = {"dtype": BF16, "device": torch.device("cpu")}
        own = on | {"dtype": lora_dtype}
        return cls(
            signed(M, K, **on),
            signed(N, K, **on),
            signed(N, **on),
            signed(S, R, K, **own),
            signed(S, N, R, **own, size=max(R, 1) ** -0.5),
            torch.randint(-1, S, (M,)) if S > 1 else torch.zeros(M, dtype=torch.int64),
            torch.randn(S),
            signed(M, N, **on),
            **options,
        )

    def with_options(self) -> Batch:
        """A rank for each slot, none and all among them, and a scale for each row."""
        (M, _), (S, R, _) = self.x.shape, self.A.shape
        ranks = torch.randint(0, R + 1, (S,), dtype=torch.int32)
        ranks[torch.randperm(S)[:2]] = torch.tensor([0, R], dtype=torch.int32)[:S]
        return replace(self, ranks=ranks, row_scales=torch.randn(M))

    def onto(self) -> Batch:
        return replace(self, W=None, bias=None)

    def take(self, rows: Tensor) -> Batch:
        scales = None if self.row_scales is None else self.row_scales[rows]
        return replace(self, x=self.x[rows], ids=self.ids[rows], y=self.y[rows], row_scales=scales)

    def results(self, columns: int) -> tuple[Guarded, Guarded]:
        M = self.x.shape[0]
        start = self.y if self.W is None else torch.full_like(self.y, math.nan)
        return Guarded(start), Guarded(self.x.new_full((M, columns), math.nan))

    def multi(self, page: int = 0) -> tuple[Tensor, Tensor]:
        """y and h as multi_lora_linear leaves them; of adapters in pages h is all NaN."""
        S, R, _ = self.A.shape
        adapters, ranks = Adapters(guarded(self.A), guarded(self.B)), self.ranks
        if page:
            adapters = self.in_pages(page)
            ranks = torch.full((S,), R) if ranks is None else ranks
        groups = F.group_rows(self.ids, S)
        rows = Rows(*groups.tensors, self.scalings, ranks, self.row_scales)
        y, h = self.results(R)
        given = (guarded(self.x), guarded(self.W), self.bias, adapters, rows)
        cpu_multi.run_multi(y.values, None if page else h.values, *given)
        assert y.only_values_changed()
        assert h.only_values_changed()
        return y.values.clone(), h.values.clone()

    def in_pages(self, page: int) -> Adapters:
        """Scattered, NaN where a page has ranks that no slot counts."""
        (S, R, K), N = self.A.shape, self.B.shape[1]
        width = -(-R // page)
        table = torch.randperm(S * width).view(S, width)
        A, B = (self.A.new_full((S * width, page, n), math.nan) for n in (K, N))
        for slot in range(S):
            for r in range(R if self.ranks is None else int(self.ranks[slot])):
                A[table[slot, r // page], r % page] = self.A[slot, r]
                B[table[slot, r // page], r % page] = self.B[slot, :, r]
        return Adapters(guarded(A), guarded(B).transpose(1, 2), table.to(torch.int32))

    def one(self, lora_bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """y and h as lora_linear leaves them, the first adapter for every row."""
        y, h = self.results(self.A.shape[1])
        given = (guarded(self.x), guarded(self.W), self.bias, guarded(self.A[0]))
        given += (guarded(self.B[0]), lora_bias, float(self.scalings[0]))
        cpu_linear.run_linear(y.values, h.values, *given)
        assert y.only_values_changed()
        assert h.only_values_changed()
        return y.values.clone(), h.values.clone()


def equal_but_for_nan(a: Tensor, b: Tensor) -> bool:
    """The same bits, of NaN only that it is NaN."""
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(
        bits(a)[~a.isnan()], bits(b)[~b.isnan()]
    )


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def assert_emulation_has_bits_of_hardware(call: Callable[[], tuple[Tensor, ...]]) -> None:
    native.use("amx_bf16")
    hardware = call()
    native.use("amx_emulated")
    for ours, emulated in zip(hardware, call(), strict=True):
        assert equal_but_for_nan(ours, emulated)


def assert_same_rows(results: tuple[Tensor, ...], whole: tuple[Tensor, ...], rows: Tensor) -> None:
    for some, all_rows in zip(results, whole, strict=True):
        assert same_bits(some, all_rows[rows])
