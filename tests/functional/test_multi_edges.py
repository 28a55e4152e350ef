"""Functions of many adapters at their edges: ranks, gradients, memory, and values not finite."""

import math

import pytest
import torch
from torch.nn import functional as nnf

from fastlora import functional as F
from fastlora.backends.torch import multi as reference_multi
from fastlora.backends.torch import wide_products as products
from tests.support.helpers import (
    DTYPES,
    Spy,
    leaves,
    same_bits,
)
from tests.support.multi_calls import WORKLOADS, batch, call_add, call_linear

pytestmark = pytest.mark.usefixtures("backend")


CPU = torch.device("cpu")


NAMES = ("x", "weight", "bias", "lora_A", "lora_B")


def test_multi_add_ignores_what_h_held_before(device, backend):
    """NaN in scratch is overwritten, also where a row has no adapter or its slot a lower rank."""
    ids = torch.tensor([0, -1, 1, 0])
    tensors, routing = batch((4,), ids, 9, 7, 3, 2, torch.float32, torch.float32, device)
    routing["ranks"] = torch.tensor([2, 0], device=device)
    want = call_add(F.multi_lora_linear, tensors, routing)
    y = nnf.linear(tensors["x"], tensors["weight"], tensors["bias"])
    h = y.new_full((4, 3), math.nan)
    groups = F.group_rows(routing["adapter_ids"], 2)
    per_row = (routing["scalings"], routing["ranks"], routing["row_scales"])
    given = (tensors["x"], tensors["lora_A"], tensors["lora_B"], *groups.tensors)
    torch.ops.fastlora.multi_lora_add_(y, h, *given, *per_row, False, backend)
    assert same_bits(y, want)
    assert (h != 0).sum(1).tolist() == [2, 0, 0, 2]


@pytest.mark.parametrize("rank", [-1, 9])
def test_rank_out_of_range_is_clamped(rank, device):
    tensors, routing = batch((6,), 1, 9, 7, 4, 2, torch.float32, torch.float32, device)
    given = {**routing, "ranks": torch.full((2,), rank, device=device)}
    meant = {**routing, "ranks": torch.full((2,), min(max(rank, 0), 4), device=device)}
    got = call_linear(F.multi_lora_linear, tensors, given)
    assert same_bits(got, call_linear(F.multi_lora_linear, tensors, meant))


@pytest.mark.parametrize(
    "needed, gemms",
    [(("x",), 5), (("weight",), 1), (("bias",), 0), (("lora_A",), 4), (("lora_B",), 2)],
)
def test_multi_backward_computes_only_gradients_asked_for(needed, gemms, backend):
    ids = torch.tensor([0, 0, -1, 1, 1])  # two adapters, neighbours each
    tensors, routing = batch((5,), ids, 9, 7, 3, 2, torch.float32, torch.float32, CPU)
    routing["ranks"] = torch.tensor([3, 2])
    every, part = leaves(tensors), leaves(tensors, *needed)
    call_linear(F.multi_lora_linear, every, routing).sum().backward()
    dy = torch.ones_like(y := call_linear(F.multi_lora_linear, part, routing))
    with Spy() as spy:
        y.backward(dy)
    assert spy.gemms == gemms or backend != "torch"
    for name in NAMES:
        assert (part[name].grad is None) == (name not in needed)
        assert part[name].grad is None or same_bits(part[name].grad, every[name].grad)


@pytest.mark.parametrize("workload", ["distinct", "blocks"])
@pytest.mark.parametrize("backend", ["torch"], indirect=True)
def test_multi_lora_linear_allocates_little_beyond_result(workload, backend):
    """One M*N tensor, the result; nothing N*K; rows that lie apart are gathered few at a time."""
    M, N, K, R, S = 1500, 288, 320, 4, 2
    ids = WORKLOADS[workload](M, S)
    tensors, routing = batch((M,), ids, N, K, R, S, torch.bfloat16, torch.float32, CPU)
    t = leaves(tensors, "x", "lora_A", "lora_B")
    with Spy() as spy:
        y = call_linear(F.multi_lora_linear, t, routing)
    gathered = reference_multi._GATHER * max(N, K)
    assert gathered < N * K < M * K
    assert spy.sizes()[0] == M * N
    assert spy.sizes()[1] <= gathered
    dy = torch.ones_like(y)
    with Spy() as spy:
        y.backward(dy)
    assert spy.sizes()[0] == M * K
    assert spy.sizes()[1] <= max(gathered, products._CPU_BLOCK)  # float32 blocks of x and dy
    assert max(spy.sizes(torch.bfloat16)[1:]) <= gathered


@pytest.mark.parametrize("dtype, lora_dtype", DTYPES.values(), ids=DTYPES)
def test_multi_lora_linear_repeats_bits_for_same_input(dtype, lora_dtype, device):
    tensors, routing = batch((63,), 1, 65, 33, 8, 5, dtype, lora_dtype, device)
    results = []
    for _ in range(2):
        t = leaves(tensors)
        y = call_linear(F.multi_lora_linear, t, routing)
        y.backward(y.detach())
        results.append([y, *(t[n].grad for n in NAMES)])
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))


def test_non_finite_scaling_of_used_slot_is_named(backend):
    """That of a slot in use: the others may hold anything."""
    tensors, routing = batch((3,), 1, 9, 7, 3, 4, torch.float32, torch.float32, CPU)
    routing |= {"adapter_ids": torch.tensor([2, -1, 2]), "scalings": torch.full((4,), math.nan)}
    if backend == "triton":
        y = call_linear(F.multi_lora_linear, tensors, routing | {"ranks": torch.full((4,), 3)})
        assert y.isnan().all(1).tolist() == [True, False, True]
        return
    with pytest.raises(ValueError, match=r"scalings: expected finite numbers, got nan for slot 2"):
        call_linear(F.multi_lora_linear, tensors, routing)


def test_ranks_of_64_bits_are_clamped(backend):
    tensors, routing = batch((6,), 1, 9, 7, 4, 2, torch.float32, torch.float32, CPU)
    given = {**routing, "ranks": torch.tensor([2**32 + 1, -(2**33)])}
    meant = {**routing, "ranks": torch.tensor([4, 0])}
    assert same_bits(
        call_linear(F.multi_lora_linear, tensors, given),
        call_linear(F.multi_lora_linear, tensors, meant),
    )


def test_multi_lora_linear_accepts_weight_without_columns(device):
    tensors, routing = batch((5,), 1, 0, 7, 4, 2, torch.float32, torch.float32, device)
    for through in (call_linear, call_add):
        assert through(F.multi_lora_linear, tensors, routing).shape == (5, 0)


def test_one_dimensional_x_is_named_in_error():
    tensors, routing = batch((5,), 1, 9, 7, 4, 2, torch.float32, torch.float32, CPU)
    tensors["x"] = tensors["x"][0]
    with pytest.raises(ValueError, match=r"x: expected rows, \(T, K\) or \(B, ..., K\), got shape"):
        call_linear(F.multi_lora_linear, tensors, routing)
