"""Rows of several adapters in one tile: what is not finite in one never reaches another's rows."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fastlora.backends import native
from tests.support.helpers import same_bits

if native.unusable() is not None:
    pytest.skip(str(native.unusable()), allow_module_level=True)
from tests.support.tile_calls import BF16, Batch, equal_but_for_nan, threads

F32 = torch.float32
SLOTS, BAD = 4, 2
# (K, N): whole tiles, rests of both.
SIZES = [(64, 64), (70, 83), (31, 17)]
WHERE = {
    "one of A": lambda b: b.A[BAD, 1, 3:4],
    "one of B": lambda b: b.B[BAD, 5, 1:2],
    "all of A": lambda b: b.A[BAD],
    "all of B": lambda b: b.B[BAD],
    "x": lambda b: b.x[:, 3],
}


def copied(b: Batch) -> Batch:
    return replace(b, x=b.x.clone(), A=b.A.clone(), B=b.B.clone())


def spoilt(b: Batch, where: str, value: float) -> Batch:
    """One tenant's numbers are no longer finite, in its adapter or in its rows of x."""
    bad = copied(b)
    WHERE[where](bad)[... if where != "x" else b.ids == BAD] = value
    return bad


def assert_others_as_without(bad: tuple[Tensor, ...], good: tuple[Tensor, ...], b: Batch) -> None:
    others = b.ids != BAD
    for with_it, without in zip(bad, good, strict=True):
        assert equal_but_for_nan(with_it[others], without[others])
    assert same_bits(bad[0][others], good[0][others])
    assert bad[0][others].isfinite().all()


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("M", [5, 16, 40, 193])
@pytest.mark.parametrize("kind", ["in place", "copied", "ranks", "pages"])
@pytest.mark.parametrize("onto", [False, True])
def test_bad_tenant_leaves_others_in_its_tile_as_they_are(where, value, M, kind, onto, tile_set):
    R = 16 if kind == "in place" else 17
    for K, N in SIZES:
        b = Batch.of(M, K, N, R, SLOTS, F32 if kind == "copied" else BF16)
        b = replace(b, ids=(torch.arange(M) % (SLOTS + 1) - 1)[torch.randperm(M)])
        b = b.onto() if onto else b
        if kind == "ranks":
            b = replace(b, ranks=torch.tensor([5, 0, R, 2], dtype=torch.int32))
        bad = spoilt(b, where, value)
        page = 4 if kind == "pages" else 0
        after = bad.multi(page)
        assert not after[0][b.ids == BAD].isfinite().all()
        assert_others_as_without(after, b.multi(page), b)


@pytest.mark.parametrize("where", ["all of A", "all of B", "x"])
@pytest.mark.parametrize("onto", [False, True])
@pytest.mark.parametrize("first", [1, 7, 8, 15])
def test_bad_tenant_leaves_tiles_it_ends_and_begins_in_as_they_are(where, onto, first, tile_set):
    """Rows sorted by adapter: the first and the last tile of a tenant are others' too."""
    rows = 16 * 8
    b = Batch.of(rows, 70, 83, 16, SLOTS)
    b = b.onto() if onto else b
    ids = torch.full((rows,), 3)
    ids[:first] = -1
    ids[first : first + 30] = 0
    ids[first + 30 : first + 70] = BAD
    b = replace(b, ids=ids)
    for value in (math.nan, math.inf):
        assert_others_as_without(spoilt(b, where, value).multi(), b.multi(), b)


@pytest.mark.parametrize("where", ["all of A", "all of B", "x"])
@pytest.mark.parametrize("onto", [False, True])
def test_bad_tenant_leaves_others_as_they_are_where_K_is_cut(where, onto, tile_set):
    b = Batch.of(200, 2085, 40, 8, SLOTS)
    b = b.onto() if onto else b
    with threads(2):
        assert_others_as_without(spoilt(b, where, math.inf).multi(), b.multi(), b)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("onto", [False, True])
def test_bad_row_leaves_rows_of_the_same_adapter_as_they_are(value, onto, tile_set):
    for M in (16, 17, 40, 193):
        b = Batch.of(M, 70, 83, 17)
        b = b.onto() if onto else b
        bad = copied(b)
        bad.x[M // 2, 1] = value
        others = torch.arange(M) != M // 2
        for got, want in zip(bad.one(), b.one(), strict=True):
            assert not got[M // 2].isfinite().any()
            assert same_bits(got[others], want[others])


@pytest.mark.parametrize("onto", [False, True])
def test_NaN_that_all_rows_have_in_W_or_y_does_not_spread(onto, tile_set):
    """A mixed tile that is not finite for another reason: only its own elements are NaN."""
    for M in (5, 40, 193):
        b = Batch.of(M, 70, 83, 16, SLOTS)
        want = (b.onto() if onto else b).multi()[0]
        if onto:
            b.y[M // 2, 7] = math.nan
        else:
            b.W[7, 3] = math.nan
        got = (b.onto() if onto else b).multi()[0]
        where = torch.zeros_like(got, dtype=torch.bool)
        where[M // 2 if onto else slice(None), 7] = True
        assert torch.equal(got.isnan(), where)
        assert same_bits(got[~where], want[~where])
