"""How many FLOPs a call of an op has: two for each product and its sum.

Every row of many adapters counts with all R ranks: which adapter it has lies on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# What the formulas get in place of a tensor.
Shape = Sequence[int]


def none(*_: Any, **__: Any) -> int:
    return 0


def linear(x: Shape, weight: Shape, _bias: Any, lora_A: Shape, *_: Any, **__: Any) -> int:
    (M, K), N, R = x, weight[0], lora_A[-2]
    return 2 * M * (N * K + R * (K + N))


def add(_y: Any, _h: Any, x: Shape, lora_A: Shape, lora_B: Shape, *_: Any, **__: Any) -> int:
    (M, K), N, R = x, lora_B[-2], lora_A[-2]
    return 2 * M * R * (K + N)


def backward(
    dy: Shape, x: Shape, weight: Shape | None, lora_A: Shape, *others: Any, **__: Any
) -> int:
    (M, N), K, R = dy, x[1], lora_A[-2]
    need_x, need_weight, _, need_A, need_B, *_ = others[-2]  # the backend is last
    base = need_weight + (need_x and weight is not None)
    through_B, through_A = (need_x or need_A) + need_B, need_x + need_A
    return 2 * M * (base * N * K + through_B * R * N + through_A * R * K)


def packed_linear(
    x: Shape, weight: Shape, _bias: Any, lora_A: Shape, lora_B: Shape, table: Shape | None,
    *_: Any, **__: Any,
) -> int:  # fmt: skip
    M, (N, K) = x[0], weight
    return 2 * M * N * K + packed_add((M, N), x, lora_A, lora_B, table)


def packed_add(
    y: Shape, x: Shape, lora_A: Shape, lora_B: Shape, table: Shape | None, *_: Any, **__: Any
) -> int:
    (M, N), K, pages = y, x[1], 1 if table is None else table[1]
    return 2 * M * pages * (lora_A[1] * K + lora_B[2] * N)


def merge(_weights: Any, lora_A: list[Shape], lora_B: list[Shape], *_: Any, **__: Any) -> int:
    return sum(2 * B[0] * A[0] * A[1] for A, B in zip(lora_A, lora_B, strict=True))


def swap(
    weights: Any, old_A: list[Shape], old_B: list[Shape], _scalings: Any, _counts: Any,
    _receipts: Any, lora_A: list[Shape], lora_B: list[Shape], *_: Any, **__: Any,
) -> int:  # fmt: skip
    return merge(weights, old_A, old_B) + merge(weights, lora_A, lora_B)
