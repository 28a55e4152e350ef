"""``PreparedAdd``: the numbers of ``multi_lora_add_``, and what must not be kept between calls."""

from __future__ import annotations

import pytest
import torch

import fastlora
from fastlora import functional as F
from fastlora.functional.prepared import PreparedAdd
from tests.support.adapters_in_batches import Batch
from tests.support.helpers import misaligned, same_bits, strided, unchanged

WIDTHS = (24, 8)
CPU = torch.device("cpu")


def draw(T=11, K=19, dtype=torch.float32, lora_dtype=None) -> tuple[Batch, PreparedAdd, object]:
    """A batch, the prepared call of its two slices, and ``multi_lora_add_`` of them."""
    b = Batch.draw(T, K, sum(WIDTHS), 5, 4, dtype, lora_dtype or dtype, CPU)
    A = (b.A, 2 * b.A)
    B = tuple(t.contiguous() for t in b.B.split(WIDTHS, 1))
    ranks = b.ranks.int()
    prepared = PreparedAdd(A, B, b.scalings, [ranks, ranks])

    def plain(y, x, groups):
        for a, B_i, columns in zip(A, B, (slice(0, 24), slice(24, 32)), strict=True):
            F.multi_lora_add_(y[:, columns], x, a, B_i, groups, b.scalings, ranks=ranks)
        return y

    return b, prepared, plain


def base(b: Batch):
    return torch.randn(b.x.shape[0], sum(WIDTHS)).to(b.x.dtype)


@torch.no_grad()
@pytest.mark.parametrize("lora_dtype", [None, torch.float32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("T", [0, 1, 11, 70])
def test_prepared_has_bits_of_multi_lora_add(T, dtype, lora_dtype):
    b, prepared, plain = draw(T, dtype=dtype, lora_dtype=lora_dtype)
    for _ in range(3):
        y = base(b)
        assert same_bits(prepared(y.clone(), b.x, b.groups), plain(y.clone(), b.x, b.groups))
    assert (prepared._bound is not None) == (fastlora.backend("multi_lora_add_") == "cpu")


@torch.no_grad()
@pytest.mark.parametrize("lay", [strided, misaligned, lambda t: t.T.contiguous().T])
def test_prepared_takes_any_layout_of_y_and_x(lay):
    b, prepared, plain = draw()
    prepared(base(b), b.x, b.groups)
    y = base(b)
    got = lay(y)
    assert prepared(got, lay(b.x), b.groups) is got
    assert same_bits(got, plain(y, b.x, b.groups))


@torch.no_grad()
def test_prepared_sees_what_is_written_to_its_operands():
    b, prepared, _ = draw()
    prepared(base(b), b.x, b.groups)
    prepared.lora_A[0][:, :2] *= -3
    prepared.lora_B[1][:, :, 0] = 1
    prepared.ranks[0].fill_(2)
    prepared.ranks[1].fill_(1)
    b.scalings[1] = 5
    prepared.lora_A[1].data = torch.randn(4, 5, 19)
    fresh = PreparedAdd(prepared.lora_A, prepared.lora_B, b.scalings, prepared.ranks)
    y = base(b)
    assert same_bits(prepared(y.clone(), b.x, b.groups), fresh(y.clone(), b.x, b.groups))


@torch.no_grad()
def test_prepared_follows_the_backend_asked_for():
    b, prepared, plain = draw()
    prepared(base(b), b.x, b.groups)
    y = base(b)
    with fastlora.use_backend("torch"):
        got, want = prepared(y.clone(), b.x, b.groups), plain(y.clone(), b.x, b.groups)
    assert same_bits(got, want)


@torch.no_grad()
def test_prepared_keeps_x_where_it_shares_memory_with_y():
    b, prepared, plain = draw(K=32)
    prepared(base(b), b.x, b.groups)
    y = base(b)
    want = plain(y.clone(), y.clone(), b.groups)
    assert same_bits(prepared(y, y, b.groups), want)


@torch.no_grad()
def test_prepared_counts_its_writes_for_autograd():
    b, prepared, _ = draw()
    y = base(b)
    prepared(y, b.x, b.groups)
    before = y._version
    prepared(y, b.x, b.groups)
    assert y._version > before


@torch.no_grad()
def test_prepared_is_seen_by_modes():
    from torch.utils.flop_counter import FlopCounterMode

    b, prepared, _ = draw()
    prepared(base(b), b.x, b.groups)
    with FlopCounterMode(display=False) as counted:
        prepared(base(b), b.x, b.groups)
    assert counted.get_total_flops()


@pytest.mark.parametrize("again", [False, True])
def test_prepared_refuses_what_does_not_fit(again):
    b, prepared, _ = draw()
    y = base(b)
    if again:
        with torch.no_grad():
            prepared(base(b), b.x, b.groups)
    wrong = {
        "y: expected 32 columns": (y[:, :20], b.x, b.groups),
        "adapter_ids: expected shape": (y[:3], b.x[:3], b.groups),
        "adapter_ids: grouped for 9": (y, b.x, F.group_rows(b.ids, 9)),
        "expected shape": (y, b.x[:, :7], b.groups),
        "dtype": (y.double(), b.x, b.groups),
    }
    for message, call in wrong.items():
        with unchanged(y), pytest.raises((ValueError, TypeError), match=f"(?i){message}"):
            prepared(*call)
    with pytest.raises(ValueError, match="not differentiable"):
        prepared(y, b.x.clone().requires_grad_(), b.groups)
    b.scalings[0] = float("nan")
    with torch.no_grad(), pytest.raises(ValueError, match="scalings: expected finite"):
        prepared(y, b.x, F.group_rows(torch.zeros_like(b.ids), 4))


def test_prepared_refuses_slices_that_do_not_belong_together():
    b, prepared, _ = draw()
    with pytest.raises(ValueError, match="lora_A: expected as many slices"):
        PreparedAdd(prepared.lora_A, prepared.lora_B[:1], b.scalings)
    with pytest.raises(ValueError, match="at least one"):
        PreparedAdd((), (), b.scalings)
