"""Results of the ops without their values: what torch.compile and fake tensors see of a call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, library

from fastlora.backends.dtypes import BITS


def linear(x: Tensor, weight: Tensor, bias: Any, lora_A: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    M = x.shape[0]
    return x.new_empty(M, weight.shape[0]), x.new_empty(M, lora_A.shape[-2])


def packed_linear(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _select_needed(gradients: Callable[..., list[Tensor]]) -> Callable[..., list[Tensor]]:
    def fake(*args: Any) -> list[Tensor]:
        *operands, needs, _backend = args
        return [grad for grad, need in zip(gradients(*operands), needs, strict=True) if need]

    return fake


def _linear_gradients(
    dy: Tensor, x: Tensor, weight: Tensor | None, lora_A: Tensor, lora_B: Tensor, *_: Any
) -> list[Tensor]:
    N = dy.shape[1]
    return [
        x.new_empty(x.shape),
        dy.new_empty(N, x.shape[1]),
        dy.new_empty(N),
        lora_A.new_empty(lora_A.shape),
        lora_B.new_empty(lora_B.shape),
        lora_B.new_empty(N),
    ]


def _multi_gradients(*args: Any) -> list[Tensor]:
    return _linear_gradients(*args)[:5]


linear_backward = _select_needed(_linear_gradients)
multi_linear_backward = _select_needed(_multi_gradients)


def group_rows(ids: Tensor, num_slots: int, _backend: str) -> tuple[Tensor, Tensor, Tensor]:
    order = ids.new_empty(ids.shape, dtype=torch.int64)
    return ids.new_empty(ids.shape, dtype=torch.int32), order, order.new_empty(num_slots + 1)


def merge(weights: Sequence[Tensor], *_: Any) -> tuple[Tensor, ...]:
    context, weight = library.get_ctx(), weights[0]
    changed, tiles, sums = (context.new_dynamic_size() for _ in range(3))
    return (
        weight.new_empty(changed, dtype=torch.int16),
        weight.new_empty(changed, dtype=BITS[weight.itemsize]),
        torch.empty(tiles, dtype=torch.int32, device="cpu"),
        weight.new_empty(sums, dtype=torch.int64),
        torch.empty(len(weights), 3, dtype=torch.int64, device="cpu"),
    )


def in_place(*_: Any) -> None:
    return None
