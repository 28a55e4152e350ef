"""The functions, all called as ``f(x, weight, lora_A, lora_B)``, and weights to merge into."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as nnf

from fastlora import functional as F
from fastlora.backends.merge_lists.operands import flatten_receipts
from fastlora.ops.table import OPS
from tests.support import helpers, oracle

CPU = torch.device("cpu")
M, N, K, R, S = 5, 4, 7, 3, 2
SCALING = 0.5
IDS = torch.tensor([0, -1, 1, 0, 0])
RANKS, SCALINGS = torch.tensor([3, 2]), torch.tensor([0.5, -1.5])


def rand(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return helpers.signed(*shape, dtype=dtype, device=CPU)


def linear(x, weight, lora_A, lora_B, **dropout):
    return F.lora_linear(x, weight, lora_A, lora_B, SCALING, **dropout)


def add(x, weight, lora_A, lora_B, **dropout):
    return F.lora_add_(nnf.linear(x, weight), x, lora_A, lora_B, SCALING, **dropout)


def add_to_view(x, weight, lora_A, lora_B):
    """As where a fused projection is split, and one part of it has an adapter."""
    y = nnf.linear(x, weight.repeat(2, 1))[..., : weight.shape[0]]
    return F.lora_add_(y, x, lora_A, lora_B, SCALING)


def multi_linear(x, weight, lora_A, lora_B):
    own = (ids(x), SCALINGS.to(x.device))
    return F.multi_lora_linear(x, weight, lora_A, lora_B, *own, ranks=RANKS.to(x.device))


def multi_add(x, weight, lora_A, lora_B):
    y = nnf.linear(x, weight)
    own = (ids(x), SCALINGS.to(x.device))
    return F.multi_lora_add_(y, x, lora_A, lora_B, *own, ranks=RANKS.to(x.device))


SINGLE, MULTI = [linear, add, add_to_view], [multi_linear, multi_add]
functions = pytest.mark.parametrize("f", SINGLE + MULTI)


def ids(x: Tensor) -> Tensor:
    return IDS.repeat(2)[: x.shape[0]].to(x.device)


def operands(f, dtype: torch.dtype = torch.float32, rows: int = M) -> list[Tensor]:
    slots = (S,) if f in MULTI else ()
    shapes = [(rows, K), (N, K), (*slots, R, K), (*slots, N, R)]
    return [rand(*shape, dtype=dtype) for shape in shapes]


def unfused_function(f):
    """What f computes, as a function that torch differentiates by itself."""

    def many(x, weight, lora_A, lora_B):
        y = nnf.linear(x, weight)
        for slot, r in enumerate(RANKS.tolist()):
            rows = SCALINGS[slot].item() * (ids(x) == slot).to(x.dtype)[:, None]
            y = y + rows * (x @ lora_A[slot, :r].T @ lora_B[slot, :, :r].T)
        return y

    def one(x, weight, lora_A, lora_B):
        return helpers.lora_linear(x, weight, lora_A, lora_B, SCALING)

    return many if f in MULTI else one


# What unmerge_ says of a weight that is not the one it should be.
MERGED = r"not the one that this receipt's merge left"


def weight_and_adapter(
    N: int, K: int, R: int, dtype, device=CPU, ratio: float = 0.1, lora_dtype=None
) -> tuple[Tensor, tuple[Tensor, Tensor, float]]:
    """A weight like a layer's and an adapter whose |d| / |W| is ``ratio``."""
    lora = {"dtype": lora_dtype or torch.float32, "device": device}
    size = 1 / math.sqrt(max(K, 1))
    A, B = helpers.signed(R, K, **lora), helpers.signed(N, R, **lora)
    scaling = -ratio * size / math.sqrt(max(R, 1))
    return helpers.signed(N, K, dtype=dtype, device=device, size=size), (A, B, scaling)


def assert_one_rounding(merged: Tensor, weight: Tensor, adapters: list) -> None:
    """Off by half a unit in the last place, and by what a sum of R float32 products may be."""
    want = oracle.merge(weight, adapters)
    _assert_near(merged, want, _half_unit(want, weight.dtype), adapters)


def assert_swapped(swapped: Tensor, merged: Tensor, old: list, new: list) -> None:
    """As ``assert_one_rounding``; ``merged``, which held old, had been rounded once as well."""
    want = oracle.swap(merged, old, new)
    roundings = sum(_half_unit(t.double().cpu(), merged.dtype) for t in (want, merged))
    _assert_near(swapped, want, roundings, [*old, *new])


def _half_unit(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The most that rounding to these values, or of them, may change."""
    ulp = torch.finfo(dtype)
    return ulp.eps / 2 * values.abs() + ulp.smallest_normal * ulp.eps / 2


def _assert_near(got: Tensor, want: Tensor, roundings: Tensor, adapters: list) -> None:
    size = want.abs()
    for A, B, scaling in adapters:
        size = size + abs(scaling) * (B.double().abs() @ A.double().abs()).cpu()
    terms = sum(A.shape[0] for A, _, _ in adapters) + 2
    sums = terms * torch.finfo(torch.promote_types(got.dtype, torch.float32)).eps * size
    assert bool(((got.double().cpu() - want).abs() <= roundings * (1 + 1e-6) + sums).all())


def last_arguments(op: str, backend: str) -> tuple[bool | str, ...]:
    """What a raw op takes behind its operands."""
    return (False, backend) if OPS[op].independent_rows else (backend,)


def merge_calls(device, backend: str) -> dict[str, list[tuple]]:
    """Operands of the ops that merge, of two weights with two adapters and one."""
    weights = [rand(N, K).to(device) for _ in range(2)]
    A = [rand(R, K).to(device) for _ in range(3)]
    B = [rand(N, R).to(device) for _ in range(3)]
    adapters, none = (A, B, [0.5, 0.25, 2.0], [2, 1]), ([], [], [], [0])
    merged = [w.clone() for w in weights]
    made = torch.ops.fastlora.merge_(merged, *adapters, True, backend)
    parts = flatten_receipts(made)
    first = (*(t[:2] for t in adapters[:3]), [2])
    return {
        "merge_": [(weights, *adapters, True), (weights[:1], *none, False)],
        "unmerge_": [(merged, *adapters, parts)],
        "swap_": [
            (merged, *adapters, parts, *adapters),
            (merged[:1], *first, parts[:4], *none),
        ],
    }
