"""Many adapters in one batch: values, gradients, routing, and what never reaches a row."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as nnf

from fastlora import functional as F
from fastlora.backends.torch import multi as reference_multi
from fastlora.backends.torch import wide_products as products
from tests.support import oracle
from tests.support.helpers import (
    DTYPES,
    LAYOUTS,
    Spy,
    assert_accurate,
    leaves,
    matrix,
    multi_lora_linear,
    same_bits,
    signed,
    unchanged,
)
from tests.thinning import skip_where

pytestmark = pytest.mark.usefixtures("backend")

CPU = torch.device("cpu")
NAMES = ("x", "weight", "bias", "lora_A", "lora_B")

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
# Adapter ids as batches really have them.
WORKLOADS = {
    "distinct": lambda T, S: torch.arange(T) % S,
    "identical": lambda T, S: torch.full((T,), S - 1),
    "blocks": lambda T, S: torch.arange(T) * (S + 1) // T - 1,
    "skewed": lambda T, S: torch.where(torch.rand(T) < 0.8, 0, torch.arange(T) % (S + 1) - 1),
    "none": lambda T, S: torch.full((T,), -1),
}


def batch(lead, ids, N, K, R, S, dtype, lora_dtype, device) -> tuple[dict, dict]:
    """(tensors, routing): every adapter's delta about as large as the base product."""
    base, lora = {"dtype": dtype, "device": device}, {"dtype": lora_dtype, "device": device}
    tensors = {
        "x": signed(*lead, K, **base),
        "weight": signed(N, K, **base),
        "bias": signed(N, **base),
        "lora_A": signed(S, R, K, **lora),
        "lora_B": signed(S, N, R, **lora, size=1 / math.sqrt(max(R, 1))),
    }
    rows = lead[: ids if isinstance(ids, int) else ids.dim()]
    routing = {
        "adapter_ids": torch.randint(-1, S, rows) if isinstance(ids, int) else ids,
        "scalings": signed(S, dtype=torch.float32, device=device),
        "ranks": torch.randint(0, R + 1, (S,)),
        "row_scales": signed(*rows, dtype=torch.float32, device=device),
    }
    return tensors, {name: t.to(device) for name, t in routing.items()}


def whole(f, t: dict, routing: dict) -> Tensor:
    args = (t["x"], t["weight"], t["lora_A"], t["lora_B"])
    return f(*args, bias=t["bias"], **routing)


def added(f, t: dict, routing: dict) -> Tensor:
    if f is multi_lora_linear:
        return whole(f, t, routing)
    y = nnf.linear(t["x"], t["weight"], t["bias"])
    return F.multi_lora_add_(y, t["x"], t["lora_A"], t["lora_B"], **routing)


def by_row(routing: dict, lead: tuple[int, ...]) -> dict:
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
    rows = {**tensors, "x": matrix(tensors["x"])}
    per_row = by_row(routing, tuple(tensors["x"].shape[:-1]))
    ours, plain = leaves(tensors), leaves(rows)
    y, unfused = (
        through(F.multi_lora_linear, ours, routing),
        whole(multi_lora_linear, plain, per_row),
    )
    assert_accurate(matrix(y), whole(oracle.multi_lora_linear, rows, per_row), unfused, dtype)

    dy = signed(*y.shape, dtype=dtype, device=y.device)
    y.backward(dy)
    unfused.backward(matrix(dy))
    args = (rows["x"], rows["weight"], rows["lora_A"], rows["lora_B"])
    want = oracle.multi_lora_grads(matrix(dy), *args, **per_row)
    for name in ("x", "lora_A", "lora_B"):
        got, reached = ours[name].grad.reshape(plain[name].shape), plain[name].grad is not None
        assert got.dtype == tensors[name].dtype
        # An adapter may have a single row.
        tokens = {} if name == "x" else {"tokens": len(rows["x"])}
        assert_accurate(got, want[name], plain[name].grad if reached else got * 0, dtype, **tokens)
    for name in ("weight", "bias"):
        assert_accurate(ours[name].grad, plain[name].grad, plain[name].grad, dtype)


def rare(lead, ids, N, K, R, S, dtype, lora_dtype, device, backend) -> str | None:
    if backend != "triton" or device.type != "cpu" or dtype == torch.float32:
        return None
    if dtype == lora_dtype:
        return "interpreted in tests/kernels/test_multi.py, where every path has all dtypes"
    form = (lead, ids, N, K, R, S) in FORMS
    return "interpreted in float32 alone: no dtype has code of its own for it" if form else None


@skip_where(rare)
@pytest.mark.parametrize("dtype, lora_dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("through", [whole, added])
@pytest.mark.parametrize("lead, ids, N, K, R, S", CASES)
def test_values_and_gradients_match_the_oracle(
    lead, ids, N, K, R, S, through, dtype, lora_dtype, device, backend
):
    tensors, routing = batch(lead, ids, N, K, R, S, dtype, lora_dtype, device)
    with unchanged(tensors, routing):
        assert_matches_oracle(through, tensors, routing)


def alike(workload, optional, device, backend) -> str | None:
    interpreted = backend == "triton" and device.type == "cpu"
    skips = interpreted and optional and workload is not WORKLOADS["blocks"]
    return "interpreted: what is optional is read alike in every workload" if skips else None


@skip_where(alike)
@pytest.mark.parametrize("through", [whole, added])
@pytest.mark.parametrize("optional", [(), ("ranks",), ("row_scales",)])
@pytest.mark.parametrize("workload", WORKLOADS.values(), ids=WORKLOADS)
def test_workloads(workload, optional, through, device, backend):
    """More rows than are gathered at a time; with and without what is optional."""
    interpreted = backend == "triton" and device.type == "cpu"
    # An interpreted kernel gathers nothing, and takes a second for so many rows.
    gathered = 20 if interpreted else reference_multi._GATHER
    ids = workload(2 * gathered + 31, 3)
    tensors, routing = batch(ids.shape, ids, 12, 7, 4, 3, torch.float32, torch.float32, device)
    needed = {n: t for n, t in routing.items() if n in ("adapter_ids", "scalings", *optional)}
    assert_matches_oracle(through, tensors, needed)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("through", [whole, added])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_strides_and_alignment(layout, through, dtype, device):
    tensors, routing = batch((3, 9), 1, 31, 37, 5, 3, dtype, torch.float32, device)
    tensors = {name: layout(t) for name, t in tensors.items()}
    with unchanged(tensors):
        assert_matches_oracle(through, tensors, routing)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_groups_in_place_of_ids(dtype, device):
    tensors, routing = batch((5, 3), 1, 9, 7, 3, 4, torch.float32, torch.float32, device)
    ids = routing["adapter_ids"].to(dtype)
    groups = {**routing, "adapter_ids": F.group_rows(ids, 4)}
    with unchanged(groups["adapter_ids"].order, groups["adapter_ids"].starts):
        for through in (whole, added):
            once = through(F.multi_lora_linear, tensors, groups)
            assert same_bits(once, through(F.multi_lora_linear, tensors, routing))


def test_adapters_tell_rows_apart(device):
    """One input under every adapter: results differ pairwise by a tenth of their size or more."""
    tensors, _ = batch((5,), 1, 31, 17, 4, 4, torch.float32, torch.float32, device)
    tensors["x"] = tensors["x"][:1].expand(5, -1)
    routing = {"adapter_ids": torch.arange(-1, 4), "scalings": torch.ones(4)}
    routing = {name: t.to(device) for name, t in routing.items()}
    y = whole(F.multi_lora_linear, tensors, routing)
    distances = torch.cdist(y, y) + 1e9 * torch.eye(5, device=device)
    assert distances.min() > 0.1 * y.norm(dim=1).max()
    alone = [
        F.lora_linear(x, tensors["weight"], A, B, 1.0, bias=tensors["bias"])
        for x, A, B in zip(tensors["x"][1:], tensors["lora_A"], tensors["lora_B"], strict=True)
    ]
    torch.testing.assert_close(y[1:], torch.stack(alone))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("workload", ["blocks", "skewed", "none"])
def test_rows_without_adapter_have_the_bits_of_the_base(workload, dtype, device):
    ids = WORKLOADS[workload](63, 3)
    tensors, routing = batch((63,), ids, 65, 33, 4, 3, dtype, torch.float32, device)
    bare = ids.to(device) == -1
    for through in (whole, added):
        nobody = {**routing, "adapter_ids": torch.full_like(routing["adapter_ids"], -1)}
        base = through(F.multi_lora_linear, tensors, nobody)
        if through is added or device.type == "cuda":
            assert same_bits(base, nnf.linear(tensors["x"], tensors["weight"], tensors["bias"]))
        y = through(F.multi_lora_linear, tensors, routing)
        assert bool(bare.any())
        assert same_bits(y[bare], base[bare])
        assert same_bits(y, base) == (workload == "none")


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("through", [whole, added])
def test_poison_reaches_nobody(through, poison, device):
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


def test_h_is_an_output_only(device, backend):
    """NaN in scratch is overwritten, also where a row has no adapter or its slot a lower rank."""
    ids = torch.tensor([0, -1, 1, 0])
    tensors, routing = batch((4,), ids, 9, 7, 3, 2, torch.float32, torch.float32, device)
    routing["ranks"] = torch.tensor([2, 0], device=device)
    want = added(F.multi_lora_linear, tensors, routing)
    y = nnf.linear(tensors["x"], tensors["weight"], tensors["bias"])
    h = y.new_full((4, 3), math.nan)
    groups = F.group_rows(routing["adapter_ids"], 2)
    per_row = (routing["scalings"], routing["ranks"], routing["row_scales"])
    given = (tensors["x"], tensors["lora_A"], tensors["lora_B"], *groups.tensors)
    torch.ops.fastlora.multi_lora_add_(y, h, *given, *per_row, False, backend)
    assert same_bits(y, want)
    assert (h != 0).sum(1).tolist() == [2, 0, 0, 2]


@pytest.mark.parametrize("rank", [-1, 9])
def test_a_rank_out_of_range_reads_nothing_out_of_bounds(rank, device):
    tensors, routing = batch((6,), 1, 9, 7, 4, 2, torch.float32, torch.float32, device)
    given = {**routing, "ranks": torch.full((2,), rank, device=device)}
    meant = {**routing, "ranks": torch.full((2,), min(max(rank, 0), 4), device=device)}
    got = whole(F.multi_lora_linear, tensors, given)
    assert same_bits(got, whole(F.multi_lora_linear, tensors, meant))


@pytest.mark.parametrize(
    "needed, gemms",
    [(("x",), 5), (("weight",), 1), (("bias",), 0), (("lora_A",), 4), (("lora_B",), 2)],
)
def test_only_the_gradients_asked_for_are_computed(needed, gemms, backend):
    ids = torch.tensor([0, 0, -1, 1, 1])  # two adapters, neighbours each
    tensors, routing = batch((5,), ids, 9, 7, 3, 2, torch.float32, torch.float32, CPU)
    routing["ranks"] = torch.tensor([3, 2])
    every, part = leaves(tensors), leaves(tensors, *needed)
    whole(F.multi_lora_linear, every, routing).sum().backward()
    dy = torch.ones_like(y := whole(F.multi_lora_linear, part, routing))
    with Spy() as spy:
        y.backward(dy)
    assert spy.gemms == gemms or backend != "torch"
    for name in NAMES:
        assert (part[name].grad is None) == (name not in needed)
        assert part[name].grad is None or same_bits(part[name].grad, every[name].grad)


@pytest.mark.parametrize("workload", ["distinct", "blocks"])
@pytest.mark.parametrize("backend", ["torch"], indirect=True)
def test_memory(workload, backend):
    """One M*N tensor, the result; nothing N*K; rows that lie apart are gathered few at a time."""
    M, N, K, R, S = 1500, 288, 320, 4, 2
    ids = WORKLOADS[workload](M, S)
    tensors, routing = batch((M,), ids, N, K, R, S, torch.bfloat16, torch.float32, CPU)
    t = leaves(tensors, "x", "lora_A", "lora_B")
    with Spy() as spy:
        y = whole(F.multi_lora_linear, t, routing)
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
def test_same_input_same_bits(dtype, lora_dtype, device):
    tensors, routing = batch((63,), 1, 65, 33, 8, 5, dtype, lora_dtype, device)
    results = []
    for _ in range(2):
        t = leaves(tensors)
        y = whole(F.multi_lora_linear, t, routing)
        y.backward(y.detach())
        results.append([y, *(t[n].grad for n in NAMES)])
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))


def test_a_scaling_that_is_not_finite_is_named(backend):
    """That of a slot in use: the others may hold anything."""
    tensors, routing = batch((3,), 1, 9, 7, 3, 4, torch.float32, torch.float32, CPU)
    routing |= {"adapter_ids": torch.tensor([2, -1, 2]), "scalings": torch.full((4,), math.nan)}
    if backend == "triton":
        y = whole(F.multi_lora_linear, tensors, routing | {"ranks": torch.full((4,), 3)})
        assert y.isnan().all(1).tolist() == [True, False, True]
        return
    with pytest.raises(ValueError, match=r"scalings: expected finite numbers, got nan for slot 2"):
        whole(F.multi_lora_linear, tensors, routing)


def test_ranks_of_64_bits(backend):
    tensors, routing = batch((6,), 1, 9, 7, 4, 2, torch.float32, torch.float32, CPU)
    given = {**routing, "ranks": torch.tensor([2**32 + 1, -(2**33)])}
    meant = {**routing, "ranks": torch.tensor([4, 0])}
    assert same_bits(
        whole(F.multi_lora_linear, tensors, given), whole(F.multi_lora_linear, tensors, meant)
    )


def test_no_columns(device):
    tensors, routing = batch((5,), 1, 0, 7, 4, 2, torch.float32, torch.float32, device)
    for through in (whole, added):
        assert through(F.multi_lora_linear, tensors, routing).shape == (5, 0)


def test_x_without_rows_is_named():
    tensors, routing = batch((5,), 1, 9, 7, 4, 2, torch.float32, torch.float32, CPU)
    tensors["x"] = tensors["x"][0]
    with pytest.raises(ValueError, match=r"x: expected rows, \(T, K\) or \(B, ..., K\), got shape"):
        whole(F.multi_lora_linear, tensors, routing)
