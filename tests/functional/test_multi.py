"""Functions of many adapters in one batch: values, gradients, routing, and rows that stay apart."""

import math

import pytest
import torch
from torch.nn import functional as nnf

from fastlora import functional as F
from fastlora.backends.torch import multi as reference_multi
from tests.support import oracle
from tests.support.helpers import (
    DTYPES,
    LAYOUTS,
    as_rows,
    assert_accurate,
    leaves,
    multi_lora_linear,
    same_bits,
    signed,
    unchanged,
)
from tests.support.multi_calls import WORKLOADS, batch, call_add, call_linear
from tests.thinning import skip_where

pytestmark = pytest.mark.usefixtures("backend")


# x's leading dimensions, how many of them the ids have, N, K, R, S.
CASES = [
    ((1,), 1, 5, 7, 1, 1),
    ((63,), 1, 65, 33, 8, 5),
    ((7,), 1, 2049, 9, 3, 3),
    ((7,), 1, 12, 1128, 16, 3),
    ((431,), 1, 6, 10, 2, 3),
    # From here on it is not a size that is odd, and no dtype has code of its own for it.
    ((31,), 1, 9, 11, 4, 63),
    ((4, 5), 1, 17, 12, 3, 3),
    ((4, 5), 2, 17, 12, 3, 3),
    ((3,), 1, 5, 7, 0, 2),
    ((3,), 1, 5, 7, 2, 0),
    ((0,), 1, 5, 7, 2, 3),
    ((3, 0), 1, 5, 7, 2, 3),
]
FORMS = CASES[5:]


def spread_routing(routing: dict, lead: tuple[int, ...]) -> dict:
    """The routing with one id and one scale a row."""
    spread = dict(routing)
    for name in ("adapter_ids", "row_scales"):
        given = routing.get(name)
        if given is not None:
            more = given.reshape(*given.shape, *(1,) * (len(lead) - given.dim()))
            spread[name] = more.expand(lead).reshape(-1)
    return spread


def assert_matches_oracle(through, tensors: dict, routing: dict) -> None:
    dtype = tensors["x"].dtype
    rows = {**tensors, "x": as_rows(tensors["x"])}
    per_row = spread_routing(routing, tuple(tensors["x"].shape[:-1]))
    ours, plain = leaves(tensors), leaves(rows)
    y, unfused = (
        through(F.multi_lora_linear, ours, routing),
        call_linear(multi_lora_linear, plain, per_row),
    )
    assert_accurate(
        as_rows(y), call_linear(oracle.multi_lora_linear, rows, per_row), unfused, dtype
    )

    dy = signed(*y.shape, dtype=dtype, device=y.device)
    y.backward(dy)
    unfused.backward(as_rows(dy))
    args = (rows["x"], rows["weight"], rows["lora_A"], rows["lora_B"])
    want = oracle.multi_lora_grads(as_rows(dy), *args, **per_row)
    for name in ("x", "lora_A", "lora_B"):
        got, reached = ours[name].grad.reshape(plain[name].shape), plain[name].grad is not None
        assert got.dtype == tensors[name].dtype
        # An adapter may have a single row.
        tokens = {} if name == "x" else {"tokens": len(rows["x"])}
        assert_accurate(got, want[name], plain[name].grad if reached else got * 0, dtype, **tokens)
    for name in ("weight", "bias"):
        assert_accurate(ours[name].grad, plain[name].grad, plain[name].grad, dtype)


def reason_to_skip_form(lead, ids, N, K, R, S, dtype, lora_dtype, device, backend) -> str | None:
    if backend != "triton" or device.type != "cpu" or dtype == torch.float32:
        return None
    if dtype == lora_dtype:
        return "interpreted in tests/kernels/test_multi.py, where every path has all dtypes"
    form = (lead, ids, N, K, R, S) in FORMS
    return "interpreted in float32 alone: no dtype has code of its own for it" if form else None


@skip_where(reason_to_skip_form)
@pytest.mark.parametrize("dtype, lora_dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("through", [call_linear, call_add])
@pytest.mark.parametrize("lead, ids, N, K, R, S", CASES)
def test_multi_lora_linear_matches_oracle_with_gradients(
    lead, ids, N, K, R, S, through, dtype, lora_dtype, device, backend
):
    tensors, routing = batch(lead, ids, N, K, R, S, dtype, lora_dtype, device)
    with unchanged(tensors, routing):
        assert_matches_oracle(through, tensors, routing)


def reason_to_skip_workload(workload, optional, device, backend) -> str | None:
    interpreted = backend == "triton" and device.type == "cpu"
    skips = interpreted and optional and workload is not WORKLOADS["blocks"]
    return "interpreted: what is optional is read alike in every workload" if skips else None


@skip_where(reason_to_skip_workload)
@pytest.mark.parametrize("through", [call_linear, call_add])
@pytest.mark.parametrize("optional", [(), ("ranks",), ("row_scales",)])
@pytest.mark.parametrize("workload", WORKLOADS.values(), ids=WORKLOADS)
def test_multi_lora_linear_matches_oracle_on_workloads(
    workload, optional, through, device, backend
):
    """More rows than are gathered at a time; with and without what is optional."""
    interpreted = backend == "triton" and device.type == "cpu"
    # An interpreted kernel gathers nothing, and takes a second for so many rows.
    gathered = 20 if interpreted else reference_multi._GATHER
    ids = workload(2 * gathered + 31, 3)
    tensors, routing = batch(ids.shape, ids, 12, 7, 4, 3, torch.float32, torch.float32, device)
    needed = {n: t for n, t in routing.items() if n in ("adapter_ids", "scalings", *optional)}
    assert_matches_oracle(through, tensors, needed)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("through", [call_linear, call_add])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_multi_lora_linear_accepts_strides_and_alignment(layout, through, dtype, device):
    tensors, routing = batch((3, 9), 1, 31, 37, 5, 3, dtype, torch.float32, device)
    tensors = {name: layout(t) for name, t in tensors.items()}
    with unchanged(tensors):
        assert_matches_oracle(through, tensors, routing)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_row_groups_equal_ids_bit_for_bit(dtype, device):
    tensors, routing = batch((5, 3), 1, 9, 7, 3, 4, torch.float32, torch.float32, device)
    ids = routing["adapter_ids"].to(dtype)
    groups = {**routing, "adapter_ids": F.group_rows(ids, 4)}
    with unchanged(groups["adapter_ids"].order, groups["adapter_ids"].starts):
        for through in (call_linear, call_add):
            once = through(F.multi_lora_linear, tensors, groups)
            assert same_bits(once, through(F.multi_lora_linear, tensors, routing))


def test_one_input_differs_under_every_adapter(device):
    """One input under every adapter: results differ pairwise by a tenth of their size or more."""
    tensors, _ = batch((5,), 1, 31, 17, 4, 4, torch.float32, torch.float32, device)
    tensors["x"] = tensors["x"][:1].expand(5, -1)
    routing = {"adapter_ids": torch.arange(-1, 4), "scalings": torch.ones(4)}
    routing = {name: t.to(device) for name, t in routing.items()}
    y = call_linear(F.multi_lora_linear, tensors, routing)
    distances = torch.cdist(y, y) + 1e9 * torch.eye(5, device=device)
    assert distances.min() > 0.1 * y.norm(dim=1).max()
    alone = [
        F.lora_linear(x, tensors["weight"], A, B, 1.0, bias=tensors["bias"])
        for x, A, B in zip(tensors["x"][1:], tensors["lora_A"], tensors["lora_B"], strict=True)
    ]
    torch.testing.assert_close(y[1:], torch.stack(alone))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("workload", ["blocks", "skewed", "none"])
def test_rows_without_adapter_have_base_bits(workload, dtype, device):
    ids = WORKLOADS[workload](63, 3)
    tensors, routing = batch((63,), ids, 65, 33, 4, 3, dtype, torch.float32, device)
    bare = ids.to(device) == -1
    for through in (call_linear, call_add):
        nobody = {**routing, "adapter_ids": torch.full_like(routing["adapter_ids"], -1)}
        base = through(F.multi_lora_linear, tensors, nobody)
        if through is call_add or device.type == "cuda":
            assert same_bits(base, nnf.linear(tensors["x"], tensors["weight"], tensors["bias"]))
        y = through(F.multi_lora_linear, tensors, routing)
        assert bool(bare.any())
        assert same_bits(y[bare], base[bare])
        assert same_bits(y, base) == (workload == "none")


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("through", [call_linear, call_add])
def test_nan_in_unused_parts_reaches_no_row(through, poison, device):
    """In unused slots, past a slot's rank, in another row: the rest keeps its bits."""
    ids = torch.tensor([0, 2, -1, 0, 2, 2, -1, 0])
    tensors, routing = batch((8,), ids, 9, 7, 4, 4, torch.float32, torch.float32, device)
    routing["ranks"] = torch.tensor([2, 4, 3, 4], device=device)
    dirty = {name: t.clone() for name, t in tensors.items()}
    for slot in (1, 3):
        dirty["lora_A"][slot] = dirty["lora_B"][slot] = poison
    for slot, r in ((0, 2), (2, 3)):
        dirty["lora_A"][slot, r:] = dirty["lora_B"][slot, :, r:] = poison
    dirty["x"][3] = dirty["x"][6] = poison
    scalings = routing["scalings"].clone()
    scalings[1] = poison
    row_scales = routing["row_scales"].clone()
    row_scales[2] = poison
    clean_rows = torch.tensor([0, 1, 2, 4, 5, 7], device=device)

    results = []
    for given, others in ((tensors, {}), (dirty, {"scalings": scalings, "row_scales": row_scales})):
        t = leaves(given, "x", "lora_A", "lora_B")
        y = through(F.multi_lora_linear, t, {**routing, **others})
        y.backward(torch.ones_like(y))
        # Slot 0 has a poisoned row, whose gradient is its own business; slot 2 has none.
        theirs = [t["lora_A"].grad[1:], t["lora_B"].grad[1:], t["x"].grad[clean_rows]]
        results.append([y[clean_rows], *theirs])
    assert all(bool(part.isfinite().all()) for part in results[1])
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))
