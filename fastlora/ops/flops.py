"""How many FLOPs the ops have, for ``torch.utils.flop_counter``: two for each product and its sum.

Every row of many adapters counts with all R ranks, since whose it is lies on the device. That
module of torch's imports triton, so it is not imported here: ``register`` does its work once
somebody else has.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

# What the formulas get in place of a tensor.
Shape = Sequence[int]

_COUNTER = "torch.utils.flop_counter"
_registered = False


def _linear(x: Shape, weight: Shape, _bias: Any, lora_A: Shape, *_: Any, **__: Any) -> int:
    (M, K), N, R = x, weight[0], lora_A[-2]
    return 2 * M * (N * K + R * (K + N))


def _add(_y: Any, _h: Any, x: Shape, lora_A: Shape, lora_B: Shape, *_: Any, **__: Any) -> int:
    (M, K), N, R = x, lora_B[-2], lora_A[-2]
    return 2 * M * R * (K + N)


def _backward(
    dy: Shape, x: Shape, weight: Shape | None, lora_A: Shape, *rest: Any, **__: Any
) -> int:
    (M, N), K, R = dy, x[1], lora_A[-2]
    need_x, need_weight, _, need_A, need_B, *_ = rest[-2]
    base = need_weight + (need_x and weight is not None)
    through_B, through_A = (need_x or need_A) + need_B, need_x + need_A
    return 2 * M * (base * N * K + through_B * R * N + through_A * R * K)


def _packed_linear(
    x: Shape, weight: Shape, _bias: Any, lora_A: Shape, lora_B: Shape, table: Shape | None,
    *_: Any, **__: Any,
) -> int:  # fmt: skip
    M, (N, K) = x[0], weight
    return 2 * M * N * K + _packed_add((M, N), x, lora_A, lora_B, table)


def _packed_add(
    y: Shape, x: Shape, lora_A: Shape, lora_B: Shape, table: Shape | None, *_: Any, **__: Any
) -> int:
    (M, N), K, pages = y, x[1], 1 if table is None else table[1]
    return 2 * M * pages * (lora_A[1] * K + lora_B[2] * N)


def _merge(_weights: Any, lora_A: list[Shape], lora_B: list[Shape], *_: Any, **__: Any) -> int:
    return sum(2 * B[0] * A[0] * A[1] for A, B in zip(lora_A, lora_B, strict=True))


def _swap(
    weights: Any, old_A: list[Shape], old_B: list[Shape], _scalings: Any, _counts: Any,
    _receipts: Any, lora_A: list[Shape], lora_B: list[Shape], *_: Any, **__: Any,
) -> int:  # fmt: skip
    return _merge(weights, old_A, old_B) + _merge(weights, lora_A, lora_B)


FLOPS: dict[str, Callable[..., int]] = {
    "lora_linear": _linear,
    "lora_add_": _add,
    "lora_linear_backward": _backward,
    "group_rows": lambda *_, **__: 0,
    "multi_lora_linear": _linear,
    "multi_lora_add_": _add,
    "multi_lora_linear_backward": _backward,
    "packed_lora_linear": _packed_linear,
    "packed_lora_add_": _packed_add,
    "merge_": _merge,
    "unmerge_": _merge,
    "swap_": _swap,
}


def register() -> None:
    """Gives torch's counters the formulas, those that count already too."""
    global _registered
    counter = sys.modules.get(_COUNTER)
    if _registered or counter is None or not hasattr(counter, "FlopCounterMode"):
        return
    _registered = True
    packets = {getattr(torch.ops.fastlora, name): formula for name, formula in FLOPS.items()}
    for packet, formula in packets.items():
        counter.register_flop_formula(packet)(formula)
    modes: Any = _get_current_dispatch_mode_stack()
    for mode in modes:
        if type(mode).__name__ == "_FlopCounterMode":
            for packet in packets:
                mode.counter.flop_registry[packet] = counter.flop_registry[packet]
