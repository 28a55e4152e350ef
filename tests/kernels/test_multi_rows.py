"""The Triton kernels for many adapters: what reaches a row, and that its bits are its own."""

import math

import pytest
import torch

import fastlora
from fastlora import functional as F
from fastlora.backends.values import Adapters, Rows
from tests.support.adapters_in_batches import Batch, Paged
from tests.support.helpers import same_bits, signed

pytest.importorskip("triton", reason="triton is not installed")

from fastlora.backends.triton import multi, multi_product
from tests.support.multi_paths import on_every_path

F32 = torch.float32
pytestmark = pytest.mark.usefixtures("triton_usable", "memory_holds_nan")


@on_every_path
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_nan_in_adapter_stays_with_its_rows(path, poison, device):
    """One tile holds rows of all: those of others, and of none, keep their bits."""
    b = Batch.draw(24, 20, 30, 4, 3, F32, F32, device)
    b = b._replace(ranks=torch.full_like(b.ranks, 4), A=b.A.nan_to_num(0.5), B=b.B.nan_to_num(0.5))
    clean, _ = multi.multi_lora_linear(b.x, b.weight, b.bias, b.adapters, b.routing, path=path)
    theirs = b.ids == 1
    assert theirs.any()
    for name in ("A", "B"):
        bad = getattr(b, name).clone()
        bad[1].view(-1)[5] = poison
        d = b._replace(**{name: bad})
        y, _ = multi.multi_lora_linear(d.x, d.weight, d.bias, d.adapters, d.routing, path=path)
        assert same_bits(y[~theirs], clean[~theirs])
        assert not y[theirs].isfinite().all(1).any()


@on_every_path
def test_ids_out_of_range_mean_no_adapter(path, device):
    """On a device nobody has looked at them: they must not become addresses."""
    b = Batch.draw(12, 20, 30, 4, 3, F32, F32, device)
    wild = b.ids.clone()
    wild[[1, 5, 9]] = torch.tensor([3, -2, 2**31 - 1], device=device)
    tame = b._replace(ids=wild.where((wild >= 0) & (wild < 3), -1))
    order, starts = torch.argsort(wild, stable=True), tame.groups.starts
    rows = Rows(wild.to(torch.int32), order, starts, b.scalings, b.ranks, b.row_scales)
    y, h = multi.multi_lora_linear(b.x, b.weight, b.bias, b.adapters, rows, path=path)
    want = multi.multi_lora_linear(b.x, b.weight, b.bias, b.adapters, tame.routing, path=path)
    assert same_bits(y, want[0])
    assert same_bits(h, want[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_row_delta_has_same_bits_in_any_batch(dtype, device):
    """Always, not within ``batch_invariant`` alone: few rows or many, sorted anyhow."""
    T = multi_product.SPLIT_ROWS + 20
    b = Batch.draw(T, 1100, 24, 6, 5, dtype, dtype, device)
    own = signed(T, 24, dtype=dtype, device=device)

    def delta(rows):
        part, y = b.rows(rows), own[rows].clone()
        h = torch.empty(len(rows), 6, dtype=dtype, device=device)
        multi.multi_lora_add_(y, h, part.x, b.adapters, part.routing)
        return y, h

    every = torch.arange(T, device=device)
    whole, whole_h = delta(every)
    for count in (1, 1, 2, 17, 64, 65):
        rows = torch.randperm(T, device=device)[:count]
        y, h = delta(rows)
        assert same_bits(y, whole[rows])
        assert same_bits(h, whole_h[rows])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_output_is_batch_invariant_along_k(dtype, device):
    """The whole output: sums over K of several parts, in as many programs or in one."""
    T = multi_product.SPLIT_ROWS + 6
    b = Batch.draw(T, 1100, 24, 5, 4, dtype, F32, device)

    def call(rows):
        part = b.rows(rows)
        how = {"bias": b.bias, "ranks": b.ranks, "row_scales": part.row_scales}
        given = (part.x, b.weight, b.A, b.B, part.ids, b.scalings)
        return F.multi_lora_linear(*given, **how)

    with fastlora.use_backend("triton"), fastlora.batch_invariant():
        whole = call(torch.arange(T, device=device))
        for count in (1, 1, 2, 33, 64, 65):
            rows = torch.randperm(T, device=device)[:count]
            assert same_bits(call(rows), whole[rows])


def test_number_of_programs_does_not_change_bits(device, monkeypatch):
    """As many programs as there are adapters, or one that takes them in turn: the same bits."""
    b = Batch.draw(40, 24, 20, 5, 12, F32, F32, device)
    given = (b.x, b.weight, b.bias, b.adapters, b.routing)
    results = {}
    for programs in (512, 6, 1):
        monkeypatch.setattr("fastlora.kernels.multi.batch.PROGRAMS", programs)
        found = [multi.multi_lora_linear(*given, path=path)[0] for path in ("prefill", "library")]
        results[programs] = torch.stack(found)
    assert same_bits(results[512], results[6])
    assert same_bits(results[512], results[1])


@on_every_path
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_slot_of_rank_0_adds_nothing_despite_scaling(path, dtype, device):
    """As a dropped slot is left: NaN, and rank 0. Beside others it must not show either."""
    b = Batch.draw(9, 20, 30, 4, 3, dtype, F32, device)
    b = b._replace(ids=torch.arange(9, device=device) % 3, scalings=b.scalings.clone())
    b.scalings[2] = math.nan
    y, _ = multi.multi_lora_linear(b.x, b.weight, b.bias, b.adapters, b.routing, path=path)
    tame = b._replace(ids=b.ids.where(b.ids != 2, -1))
    want, _ = multi.multi_lora_linear(b.x, b.weight, b.bias, b.adapters, tame.routing, path=path)
    assert same_bits(y, want)


def test_row_tensors_of_any_strides_are_accepted(device):
    """ids, order, scalings, ranks, scales, h and a table of any strides."""

    def apart(t):
        return torch.stack([t, torch.full_like(t, 3)], -1)[..., 0]

    b = Batch.draw(11, 24, 20, 5, 4, F32, F32, device)
    p = Paged.of(b.A, b.B, b.ranks, 2)
    rows = b.routing
    strided = Rows(*(apart(t) for t in rows))
    want = multi.multi_lora_linear(b.x, b.weight, b.bias, b.adapters, rows)
    got = multi.multi_lora_linear(b.x, b.weight, apart(b.bias), b.adapters, strided)
    assert all(same_bits(x, y) for x, y in zip(got, want, strict=True))
    pages = Adapters(p.A, p.B.transpose(1, 2), apart(p.table), (20,))
    given = (b.x, b.weight, b.bias, pages)
    assert same_bits(multi.packed_lora_linear(*given, strided), want[0])
    y, h = torch.zeros(11, 20, device=device), apart(torch.empty(11, 5, device=device))
    onto = torch.zeros_like(y)
    before = y._version, h._version, onto._version
    multi.multi_lora_add_(y, h, b.x, b.adapters, strided)
    multi.packed_lora_add_(onto, b.x, pages, strided)
    after = y._version, h._version, onto._version
    assert all(old < new for old, new in zip(before, after, strict=True))
    assert same_bits(h, want[1])
    assert same_bits(onto, y)
    dy = signed(11, 20, dtype=F32, device=device)
    given, needs = (dy, b.x, b.weight, b.adapters), [False, False, False, True, True]
    grads = [multi.multi_lora_linear_backward(*given, t, rows, needs) for t in (h, want[1])]
    assert all(same_bits(x, y) for x, y in zip(*grads, strict=True))


def test_gradients_past_a_slots_rank_are_zero(device):
    """Even where a row of x or dy holds NaN; and of a slot without rows, whatever its scaling."""
    b = Batch.draw(8, 24, 20, 6, 3, F32, F32, device)
    b = b._replace(
        ids=torch.tensor([0, 0, -1, 0, 0, 0, -1, 0], device=device),
        ranks=torch.tensor([4, 6, 0], device=device), scalings=b.scalings.clone(),
    )  # fmt: skip
    b.scalings[1] = math.nan
    x, dy = b.x.clone(), signed(8, 20, dtype=F32, device=device)
    x[1], dy[3] = math.nan, math.nan
    h = torch.zeros(8, 6, device=device)
    given = (dy, x, b.weight, b.adapters, h, b.routing, [False, False, False, True, True])
    dA, dB = multi.multi_lora_linear_backward(*given)
    assert dA[0, :4].isnan().any()
    assert dB[0, :, :4].isnan().any()
    for grad in (dA[0, 4:], dB[0, :, 4:], dA[1:], dB[1:]):
        assert same_bits(grad, torch.zeros_like(grad))


@on_every_path
@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_multi_path_repeats_bits_for_same_input(path, dtype, device):
    b = Batch.draw(49, 64, 80, 24, 4, dtype, F32, device)
    given = (b.x, b.weight, b.bias, b.adapters, b.routing, False, path)
    once, again = multi.multi_lora_linear(*given), multi.multi_lora_linear(*given)
    assert all(same_bits(a, b) for a, b in zip(once, again, strict=True))
