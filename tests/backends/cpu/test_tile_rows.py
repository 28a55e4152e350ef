"""One arithmetic a row: tiles give it the same bits beside any rows, by every op."""

from dataclasses import replace

import pytest
import torch

import fastlora
from fastlora import functional as F
from fastlora.backends import native
from tests.support.helpers import same_bits

if native.unusable() is not None:
    pytest.skip(str(native.unusable()), allow_module_level=True)
from tests.support.tile_calls import BF16, WATCHED, Batch, assert_same_rows, threads

F32 = torch.float32
MOST = 600
NUMBERS = [1, 2, 15, 16, 17, 33, 48, 49, 64, 65, 96, 97, 112, 113, 192, 193, 300, 511, 512, 513]
SHAPES = [(70, 83, 17), (64, 64, 16), (33, 31, 2), (128, 96, 33), (40, 50, 100)]


@pytest.mark.parametrize("K, N, R", SHAPES)
@pytest.mark.parametrize("onto", [False, True])
@pytest.mark.parametrize("lora_dtype", [BF16, F32])
def test_row_has_same_bits_in_any_number_of_rows(K, N, R, onto, lora_dtype, tile_set):
    """y and h, of one adapter and as the only one of many."""
    b = Batch.of(MOST, K, N, R, 1, lora_dtype)
    b = b.onto() if onto else b
    whole = b.one()
    for M in NUMBERS[:: 5 if WATCHED else 1]:
        rows = torch.randperm(MOST)[:M]
        some = b.take(rows)
        assert_same_rows(some.one(), whole, rows)
        assert_same_rows(some.multi(), whole, rows)
        assert_same_rows(some.multi(page=4)[:1], whole[:1], rows)


@pytest.mark.parametrize("M", [40, 193, MOST])
@pytest.mark.parametrize("onto", [False, True])
@pytest.mark.parametrize("R", [16, 17])
def test_row_has_same_bits_beside_other_adapters(M, R, onto, tile_set):
    """In tiles with rows of others and of none, in pages too: as alone, and as of one adapter."""
    b = Batch.of(M, 70, 83, R, 5)
    b = b.onto() if onto else b
    mixed, paged = b.multi(), b.multi(page=4)
    assert same_bits(paged[0], mixed[0])
    for slot in range(5):
        rows = (b.ids == slot).nonzero().flatten()
        own = replace(b, A=b.A[slot : slot + 1], B=b.B[slot : slot + 1])
        own = replace(own, scalings=b.scalings[slot : slot + 1], ids=b.ids * 0).take(rows)
        assert_same_rows(own.one(), mixed, rows)
    for row in torch.randperm(M)[:10].split(1):
        assert_same_rows(b.take(row).multi(), mixed, row)
    idle = b.ids < 0
    nothing = replace(b, A=b.A[:, :0], B=b.B[:, :, :0])
    assert same_bits(nothing.multi()[0][idle], mixed[0][idle])


@pytest.mark.parametrize("ids", ["mixed", "sorted", "by tiles"])
@pytest.mark.parametrize("onto", [False, True])
@pytest.mark.parametrize("options", [False, True])
def test_rows_have_same_bits_in_any_order(ids, onto, options, tile_set):
    """Also where tiles of 16 rows of one adapter are computed otherwise than mixed ones."""
    b = Batch.of(130, 70, 83, 17, 3)
    b = b.onto() if onto else b
    b = b.with_options() if options else b
    if ids != "mixed":
        b = replace(b, ids=b.ids.sort().values if ids == "sorted" else torch.arange(130) // 16 % 3)
    whole = b.multi()
    for rows in (torch.randperm(130), torch.randperm(130)[:70], torch.arange(0, 130, 3)):
        some = b.take(rows)
        assert_same_rows(some.multi(), whole, rows)
        if options:
            assert_same_rows(some.multi(page=4)[:1], whole[:1], rows)


@pytest.mark.parametrize("K", [2080, 4097])
def test_row_has_same_bits_where_K_is_cut(K, tile_set):
    """From 193 rows on, a long K is summed in parts."""
    b = Batch.of(200, K, 40, 17)
    whole = b.one()
    for M in (1, 17, 192, 193):
        rows = torch.randperm(200)[:M]
        assert_same_rows(b.take(rows).one(), whole, rows)


@pytest.mark.parametrize("M", [1, 40, 130, 193, MOST])
@pytest.mark.parametrize("kind", ["one", "many", "pages"])
@pytest.mark.parametrize("onto", [False, True])
def test_tiles_have_same_bits_of_any_threads(M, kind, onto, tile_set):
    b = Batch.of(M, 70, 203, 17, 1 if kind == "one" else 4)
    b = b.onto() if onto else b
    call = b.one if kind == "one" else lambda: b.multi(4 if kind == "pages" else 0)
    alone = call()
    for count in (2, 5):
        with threads(count):
            assert all(same_bits(a, b) for a, b in zip(call(), alone, strict=True))


def test_batch_invariant_ops_have_the_kernel_s_bits(tile_set):
    """As they are called: one adapter, many, in pages, and slices of a packed projection."""
    M, N = 530, 90
    b = Batch.of(M, 70, N, 16)
    A, B, ids = b.A, b.B, torch.zeros(M, dtype=torch.int64)
    whole, added = b.one()[0], b.onto().one()[0]
    in_pages = b.in_pages(4)
    pages, table = (in_pages.lora_A, in_pages.lora_B.mT), in_pages.table
    packed = {"slices": (40, N - 40)}
    twice = A.repeat(1, 2, 1)
    for rows in (slice(M), slice(1), slice(16, 33)):
        x, y, i = b.x[rows], b.y[rows], ids[rows]
        multi = {"adapter_ids": i, "scalings": b.scalings}
        with fastlora.batch_invariant():
            got = [
                F.lora_linear(x, b.W, A[0], B[0], float(b.scalings[0]), bias=b.bias),
                F.multi_lora_linear(x, b.W, A, B, **multi, bias=b.bias),
                F.multi_lora_linear(x, b.W, *pages, **multi, bias=b.bias, page_table=table),
                F.multi_lora_linear(x, b.W, twice, B, **multi, bias=b.bias, **packed),
            ]
            ours = [
                F.lora_add_(y.clone(), x, A[0], B[0], float(b.scalings[0])),
                F.multi_lora_add_(y.clone(), x, A, B, **multi),
                F.multi_lora_add_(y.clone(), x, twice, B, **multi, **packed),
                F.multi_lora_add_(y.clone(), x, *pages, **multi, page_table=table),
            ]
        assert all(same_bits(each, whole[rows]) for each in got)
        assert all(same_bits(each, added[rows]) for each in ours)


def test_sum_flushed_to_minus_zero_is_plus_zero(tile_set):
    """Minus zero plus another adapter's zeros is plus zero: alone a row has that too."""
    b = Batch.of(40, 64, 83, 2, 2)
    for t in (b.x, b.W, b.A, b.B, b.y):
        t.zero_()
    b.x[:, [0, 32]] = b.A[:, 0, [0, 32]] = 1.0
    b.W[:, 0], b.W[:, 32] = 1.5 * 2.0**-126, -1.75 * 2.0**-126
    for bias in (None, torch.full_like(b.bias, -0.0), torch.full_like(b.bias, -1e-39)):
        some = replace(b, bias=bias)
        for rows in ([0], list(range(17)), list(range(40))):
            for ids in (-1, 0):
                alone = replace(some.take(torch.tensor(rows)), ids=torch.full((len(rows),), ids))
                assert not alone.multi()[0].view(torch.int16).any()
        assert not some.multi()[0].view(torch.int16).any()


@pytest.mark.parametrize("turned", [False, True])
def test_float32_factors_below_normal_are_zeros_for_any_rows(turned, tile_set):
    """Just below the smallest normal number, which bfloat16 would round them up to."""
    for K in (40, 127):
        b = Batch.of(40, K, 83, 3, 1, F32)
        b.A.fill_(2.0**-126 * (1 - 2**-9))
        b = replace(b, x=b.x * 2.0**100, A=b.A.mT.contiguous().mT if turned else b.A)
        for M in (1, 32, 33, 40):
            assert not b.take(torch.arange(M)).one()[1].any()


@pytest.mark.parametrize("R", [1, 3, 17, 33])
def test_infinite_sum_is_not_NaN_for_any_rows(R, tile_set):
    """Ranks that only fill a step add nothing to it: Inf times their zeros would be NaN."""
    b = Batch.of(40, 40, 83, R).onto()
    b = replace(b, x=b.x.abs(), A=b.A.abs(), B=b.B.abs(), scalings=torch.ones(1))
    x, scales = b.x.clone(), torch.full((40,), torch.inf)
    x[:, 3] = torch.inf
    for M in (1, 16, 17, 40):
        for some in (replace(b, x=x), replace(b, row_scales=scales)):
            assert (some.take(torch.arange(M)).multi()[0] == torch.inf).all()
