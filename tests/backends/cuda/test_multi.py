"""The CUDA kernels for many adapters in up to 64 rows, on a GPU or on the host."""

import math

import pytest
import torch
from torch import Tensor

import fastlora
from fastlora import functional as F
from fastlora.backends import native
from fastlora.backends.values import Adapters, Rows
from fastlora.ops import dispatch
from tests.support import cuda_host
from tests.support.adapters_in_batches import Batch, Paged
from tests.support.cuda_calls import call_kernel
from tests.support.helpers import DTYPES, assert_accurate, same_bits, signed

BF16 = torch.bfloat16
# T, K, N, R, S: each tile of rows, parts of K and N, ranks beyond one item.
SHAPES = [
    (1, 64, 40, 8, 3),
    (17, 1128, 72, 16, 5),
    (63, 40, 136, 24, 40),
    (64, 136, 72, 72, 9),
    (5, 40, 2056, 16, 2),
]
if cuda_host.SANITIZED:
    SHAPES = [(1, 64, 40, 8, 3), (33, 136, 72, 72, 9)]
dtypes = pytest.mark.parametrize(
    "dtype, lora_dtype",
    [DTYPES[name] for name in ("bf16", "fp16", "bf16+fp32", "fp16+fp32")],
    ids=["bf16", "fp16", "bf16+fp32", "fp16+fp32"],
)
pytestmark = pytest.mark.usefixtures("on_cuda_kernels", "memory_holds_nan")


def run(b: Batch) -> tuple[Tensor, Tensor]:
    given = (b.x, b.weight, b.bias, b.adapters, b.routing)
    return call_kernel("multi_lora_linear", *given)


def transpose_in_memory(B: Tensor) -> Tensor:
    """The same numbers with columns of a rank side by side."""
    return B.transpose(1, 2).contiguous().transpose(1, 2)


@pytest.mark.parametrize("T, K, N, R, S", SHAPES)
@pytest.mark.parametrize("layout", [lambda B: B, transpose_in_memory], ids=["by-column", "by-rank"])
@dtypes
def test_multi_lora_linear_matches_oracle(T, K, N, R, S, layout, dtype, lora_dtype, device):
    b = Batch.draw(T, K, N, R, S, dtype, lora_dtype, device)
    b = b._replace(B=layout(b.B))
    y, h = run(b)
    want, unfused = b.want(), b.unfused()
    assert_accurate(y, want, unfused, dtype)
    b.assert_h(h)
    own = signed(T, N, dtype=dtype, device=device)
    added, h2 = own.clone(), torch.empty_like(h)
    given = (added, h2, b.x, b.adapters, b.routing)
    call_kernel("multi_lora_add_", *given)
    base = b._replace(ids=torch.full_like(b.ids, -1)).want()
    assert_accurate(added, own.cpu().double() + want - base, unfused, dtype)
    assert same_bits(h2, h)
    none = b.ids < 0
    assert same_bits(added[none], own[none])


@pytest.mark.parametrize("page", [8, 16])
@pytest.mark.parametrize("widths", [[136], [64, 40, 32]])
@dtypes
def test_pages_and_slices_equal_dense_slots(page, widths, dtype, lora_dtype, device):
    """As dense slots, a slice at a time; free pages hold NaN."""
    T, K, N, R, S = 29, 72, sum(widths), 32, 6
    b = Batch.draw(T, K, N, R, S, dtype, lora_dtype, device)
    C = len(widths)
    A = signed(S, C * R, K, dtype=lora_dtype, device=device, size=1 / math.sqrt(K))
    B = signed(S, N, R, dtype=lora_dtype, device=device, size=1 / math.sqrt(R))
    paged = Paged.of(A, B, b.ranks, page, C)
    ends = [sum(widths[: i + 1]) for i in range(C)]
    lora_B = paged.B.transpose(1, 2)
    adapters = Adapters(paged.A, lora_B, paged.table, ends)
    y = call_kernel("packed_lora_linear", b.x, b.weight, b.bias, adapters, b.routing)
    begin, own, added = 0, signed(T, N, dtype=dtype, device=device), None
    added = own.clone()
    call_kernel("packed_lora_add_", added, b.x, adapters, b.routing)
    for i, end in enumerate(ends):
        part = b._replace(
            weight=b.weight[begin:end], bias=b.bias[begin:end],
            A=A[:, i * R : (i + 1) * R], B=B[:, begin:end],
        )  # fmt: skip
        assert_accurate(y[:, begin:end], part.want(), part.unfused(), dtype)
        base = part._replace(ids=torch.full_like(b.ids, -1)).want()
        want = own[:, begin:end].cpu().double() + part.want() - base
        assert_accurate(added[:, begin:end], want, part.unfused(), dtype)
        begin = end


def test_row_has_same_bits_in_any_batch(device):
    b = Batch.draw(64, 264, 72, 24, 7, BF16, BF16, device)
    together, _ = run(b)
    for size in (1, 5, 16, 33):
        index = torch.randperm(64)[:size].to(device)
        assert same_bits(run(b.rows(index))[0], together[index])


def test_batch_invariant_holds_beyond_64_rows(device):
    """Beyond the rows that these kernels take, where another backend sums in another order."""
    b = Batch.draw(70, 1024, 1024, 16, 5, BF16, BF16, device)

    def public(b: Batch) -> Tensor:
        how = {"bias": b.bias, "ranks": b.ranks, "row_scales": b.row_scales}
        with torch.no_grad(), fastlora.batch_invariant():
            return F.multi_lora_linear(b.x, b.weight, b.A, b.B, b.ids, b.scalings, **how)

    some = torch.arange(64, device=device)
    assert same_bits(public(b.rows(some)), public(b)[:64])


def test_rows_without_adapter_have_base_bits(device):
    b = Batch.draw(40, 136, 72, 16, 5, BF16, BF16, device)
    plain, _ = run(b._replace(ids=torch.full_like(b.ids, -1)))
    none = b.ids < 0
    assert none.any()
    assert same_bits(run(b)[0][none], plain[none])


def test_nan_in_adapter_stays_with_its_rows(device):
    b = Batch.draw(40, 136, 72, 16, 5, BF16, BF16, device)
    b = b._replace(ids=b.ids.where(b.ids != 0, 1))
    y, _ = run(b)
    A, B, x = b.A.clone(), b.B.clone(), b.x.clone()
    A[0], B[0] = math.nan, math.inf
    x[3] = math.nan
    others = torch.arange(40) != 3
    poisoned, _ = run(b._replace(A=A, B=B, x=x))
    assert same_bits(poisoned[others], y[others])


def test_ids_out_of_range_mean_no_adapter(device):
    """Where the host has not looked: ids that changed on the device."""
    b = Batch.draw(9, 40, 48, 8, 3, BF16, BF16, device)
    _, order, starts, *rest = b.routing
    wild = torch.tensor([3, -2, 1 << 30, -(1 << 31), 0, 0, 0, 0, 0], device=device)
    wild = wild.to(torch.int32)
    rows = Rows(wild, order, starts, *rest)
    given = (b.x, b.weight, b.bias, b.adapters, rows)
    y, h = call_kernel("multi_lora_linear", *given)
    plain, _ = run(b._replace(ids=torch.full_like(b.ids, -1)))
    assert same_bits(y[:4], plain[:4])
    assert not h[:4].any()


@pytest.mark.parametrize("page_id", [-1, 99])
def test_pages_out_of_range_count_as_zero(page_id, device):
    b = Batch.draw(5, 40, 48, 8, 2, BF16, BF16, device)
    A, B = b.A.nan_to_num(0.5), b.B.nan_to_num(0.5)
    table = torch.tensor([[0], [page_id]], dtype=torch.int32, device=device)
    ids = torch.tensor([0, 1, 0, 1, 0], device=device)
    b = b._replace(ids=ids, ranks=torch.tensor([8, 8], device=device))
    given = (b.x, b.weight, b.bias, Adapters(A, B, table, [48]), b.routing)
    y = call_kernel("packed_lora_linear", *given)
    plain, _ = run(b._replace(A=A, B=B, ids=torch.full_like(ids, -1)))
    assert same_bits(y[1::2], plain[1::2])


@pytest.mark.parametrize("weight", [True, False])
def test_bits_are_same_in_any_thread_order(weight):
    if not native.cuda_on_host():
        pytest.skip("a GPU has an order of its own")
    b = Batch.draw(40, 264, 72, 72, 11, BF16, BF16, torch.device("cpu"))
    own = signed(40, 72, dtype=BF16, device=b.x.device)

    def once() -> Tensor:
        if weight:
            return run(b)[0]
        y = own.clone()
        given = (y, b.x.new_empty(40, 72), b.x, b.adapters, b.routing)
        call_kernel("multi_lora_add_", *given)
        return y

    first = once()
    for seed in cuda_host.ORDERS:
        with cuda_host.order(native.cuda_functions(), seed):
            assert same_bits(once(), first)


@pytest.mark.parametrize("T, R, reason", [(65, 8, "more than 64"), (3, 4, "multiples of 8")])
def test_refused_calls_run_on_the_next_backend(T, R, reason, device, caplog):
    dispatch._logged.clear()
    b = Batch.draw(T, 40, 48, R, 3, BF16, BF16, device)
    how = {"bias": b.bias, "ranks": b.ranks, "row_scales": b.row_scales}
    y = F.multi_lora_linear(b.x, b.weight, b.A, b.B, b.ids, b.scalings, **how)
    assert_accurate(y, b.want(), b.unfused(), BF16)
    assert reason in caplog.text


def test_multi_add_accepts_x_as_y(device):
    b = Batch.draw(9, 48, 48, 8, 3, BF16, BF16, device)
    how = {"ranks": b.ranks, "row_scales": b.row_scales}
    y = b.x.clone()
    F.multi_lora_add_(y, y, b.A, b.B, b.ids, b.scalings, **how)
    want = b.x.clone()
    F.multi_lora_add_(want, b.x, b.A, b.B, b.ids, b.scalings, **how)
    torch.testing.assert_close(y, want, rtol=2e-2, atol=2e-2)


def test_gradients_are_those_of_the_next_backend(device, caplog):
    b = Batch.draw(17, 64, 40, 8, 3, BF16, BF16, device)
    A, B = b.A.requires_grad_(), b.B.requires_grad_()

    def gradients() -> tuple[Tensor, ...]:
        y = F.multi_lora_linear(b.x, b.weight, A, B, b.ids, b.scalings, ranks=b.ranks)
        return torch.autograd.grad(y, (A, B), torch.ones_like(y))

    dispatch._logged.clear()
    grads = gradients()
    assert "multi_lora_linear_backward runs on another backend" in caplog.text
    with fastlora.use_backend("torch"):
        for grad, expected in zip(grads, gradients(), strict=True):
            torch.testing.assert_close(grad, expected, rtol=2**-6, atol=0.1)
