"""Adapters as vLLM holds them: a slice's A (S, 1, R, K) and B (S, 1, N, R), zeros past a rank."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastlora.integrations.vllm.layers import Layers
from tests.support import oracle
from tests.support.helpers import multi_lora_linear, signed

CPU = torch.device("cpu")


class Stacked(NamedTuple):
    """Slots of different ranks, and the rows x (T, K) with their slots; -1 is no adapter."""

    x: Tensor
    y: Tensor
    A: tuple[Tensor, ...]
    B: tuple[Tensor, ...]
    ids: Tensor
    ranks: tuple[int, ...]

    @classmethod
    def draw(
        cls,
        T: int,
        K: int,
        widths: Sequence[int],
        R: int,
        S: int,
        dtype: torch.dtype,
        device: torch.device = CPU,
    ) -> Stacked:
        """Every slot is in use, as where vLLM has as many adapters as it may have."""
        how = {"dtype": dtype, "device": device}
        ranks = (R, 0, *torch.randint(1, R + 1, (S - 2,)).tolist())
        A = tuple(signed(S, 1, R, K, **how, size=1 / math.sqrt(K)) for _ in widths)
        B = tuple(signed(S, 1, n, R, **how, size=1 / math.sqrt(R)) for n in widths)
        for slot, r in enumerate(ranks):
            for a, b in zip(A, B, strict=True):
                a[slot, :, r:], b[slot, :, :, r:] = 0, 0
        ids = torch.arange(T) % (S + 1) - 1
        ids = ids[torch.randperm(T)].to(device)
        return cls(signed(T, K, **how), signed(T, sum(widths), **how), A, B, ids, ranks)

    @property
    def slots(self) -> int:
        return self.A[0].shape[0]

    def begin(self, requests: Tensor | None = None) -> Layers:
        """Layers in a step of these rows."""
        layers = Layers()
        none = self.ids.new_empty(0)
        layers.begin(self.ids, none if requests is None else requests, range(1, self.slots + 1))
        return layers

    def want(self, y: Tensor, x: Tensor, ids: Tensor) -> Tensor:
        """y (T, N) and every row's part, in float64."""
        return y.double() + self._parts(oracle.multi_lora_linear, x, ids)

    def unfused(self, y: Tensor, x: Tensor, ids: Tensor) -> Tensor:
        return y + self._parts(multi_lora_linear, x, ids)

    def _parts(self, add, x: Tensor, ids: Tensor) -> Tensor:
        ones = torch.ones(self.slots, device=x.device)
        return torch.cat(
            [
                add(x, x.new_zeros(b.shape[2], x.shape[1]), a[:, 0], b[:, 0], ids, ones)
                for a, b in zip(self.A, self.B, strict=True)
            ],
            1,
        )
