"""Batches of many adapters, dense or in pages."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastlora import functional as F
from fastlora.backends.values import Adapters, Rows
from tests.support import oracle
from tests.support.helpers import multi_lora_linear, signed


class Batch(NamedTuple):
    """x (T, K), weight (N, K), bias (N,), A (S, R, K), B (S, N, R), and whose each row is.

    Slots have ranks of their own, at least one of them 0 and one R; past them lies NaN.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor
    A: Tensor
    B: Tensor
    ids: Tensor
    scalings: Tensor
    ranks: Tensor
    row_scales: Tensor

    @classmethod
    def draw(
        cls, T: int, K: int, N: int, R: int, S: int, dtype, lora_dtype, device: torch.device
    ) -> Batch:
        base, lora = {"dtype": dtype, "device": device}, {"dtype": lora_dtype, "device": device}
        wide = {"dtype": torch.float32, "device": device}
        ranks = torch.randint(0, R + 1, (S,))
        if S > 1:
            ranks[0], ranks[-1] = R, 0
        A = signed(S, R, K, **lora, size=1 / math.sqrt(max(K, 1)))
        B = signed(S, N, R, **lora, size=1 / math.sqrt(max(R, 1)))
        for slot, r in enumerate(ranks.tolist()):
            A[slot, r:] = B[slot, :, r:] = math.nan
        ids = torch.randint(-1, S, (T,)) if S else torch.full((T,), -1)
        return cls(
            signed(T, K, **base), signed(N, K, **base, size=1 / math.sqrt(max(K, 1))),
            signed(N, **base), A, B, ids.to(device), signed(S, **wide), ranks.to(device),
            signed(T, **wide),
        )  # fmt: skip

    @property
    def groups(self) -> F.RowGroups:
        return F.group_rows(self.ids, self.A.shape[0])

    @property
    def routing(self) -> Rows:
        return Rows(*self.groups.tensors, self.scalings, self.ranks, self.row_scales)

    @property
    def adapters(self) -> Adapters:
        return Adapters(self.A, self.B)

    def rows(self, index: Tensor) -> Batch:
        return self._replace(
            x=self.x[index], ids=self.ids[index], row_scales=self.row_scales[index]
        )

    def want(self) -> Tensor:
        return self._through(oracle.multi_lora_linear)

    def unfused(self) -> Tensor:
        return self._through(multi_lora_linear)

    def assert_h(self, h: Tensor) -> None:
        """Each row's x A of its own slot, and 0 in ranks that the slot has not."""
        for row, slot in enumerate(self.ids.tolist()):
            r = int(self.ranks[slot]) if slot >= 0 else 0
            assert not h[row, r:].any()
            if r:
                want = self.A[slot, :r].double() @ self.x[row].double()
                # Of a few numbers one may come close to cancelling.
                assert oracle.relative_error(h[row, :r], want) <= 64 * torch.finfo(h.dtype).eps

    def _through(self, f) -> Tensor:
        given = (self.x, self.weight, self.A, self.B, self.ids, self.scalings)
        how = {"bias": self.bias, "ranks": self.ranks, "row_scales": self.row_scales}
        return f(*given, **how)


class Paged(NamedTuple):
    """A batch's adapters in pages of ``page`` ranks, scattered among free ones that hold NaN."""

    A: Tensor  # (P, C * page, K)
    B: Tensor  # (P, page, N)
    table: Tensor  # (S, pages a slot), -1 where a slot has no more

    @classmethod
    def of(cls, A: Tensor, B: Tensor, ranks: Tensor, page: int, slices: int = 1) -> Paged:
        """A (S, C * R, K) and B (S, N, R) of these ranks."""
        (S, N, R), K = B.shape, A.shape[2]
        width = -(-R // page)
        used = [-(-r // page) for r in ranks.tolist()]
        P = sum(used) + 3
        free = torch.randperm(P).tolist()
        pages_A = A.new_full((P, slices, page, K), math.nan)
        pages_B = B.new_full((P, page, N), math.nan)
        table = torch.full((S, width), -1, dtype=torch.int32)
        by_slice = A.view(S, slices, R, K)
        for slot, count in enumerate(used):
            for i in range(count):
                at, ranks_here = free.pop(), slice(i * page, min((i + 1) * page, R))
                size = ranks_here.stop - ranks_here.start
                pages_A[at, :, :size] = by_slice[slot, :, ranks_here]
                pages_B[at, :size] = B[slot, :, ranks_here].T
                table[slot, i] = at
        # An entry past a slot's ranks is never followed, whatever it says.
        table[table < 0] = -7
        return cls(pages_A.flatten(1, 2), pages_B, table.to(A.device))
