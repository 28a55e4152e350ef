"""Adapters in pages on the native CPU kernels, read where they lie among other memory."""

import math
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as nnf

from fastlora import functional as F
from fastlora.backends import native
from fastlora.backends.cpu import multi as cpu_multi
from fastlora.backends.values import Adapters
from tests.support.adapters_in_batches import Batch
from tests.support.helpers import Spy, assert_accurate, same_bits, signed, unchanged

if native.unusable() is not None:
    pytest.skip(str(native.unusable()), allow_module_level=True)

CPU = torch.device("cpu")
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
KINDS = [(F32, F32), (BF16, BF16), (F16, F16), (BF16, F32), (F16, F32)]
ABSENT = [-1, -(2**31), 2**31 - 1]


class Bank(NamedTuple):
    """A batch's adapters in pages of ``page`` ranks, as a bank of many layers has them.

    Pages begin at any of an arena's places, ``UNIT`` elements apart, so that the pages one could
    name overlap; whatever is not a rank of a slot holds NaN.
    """

    A: Tensor  # (P, page, K)
    B: Tensor  # (P, page, N)
    table: Tensor  # (S, pages a slot); past a slot's ranks numbers of pages of NaN, and of none

    UNIT = 16

    @classmethod
    def of(cls, b: Batch, page: int, shift: int = 0) -> "Bank":
        """``shift``: elements past an aligned address at which the arenas begin."""
        (S, R, K), N = b.A.shape, b.B.shape[1]
        width = -(-R // page)
        step = -(-page * max(K, N, 1) // cls.UNIT) + 1
        P = (S * width + 1) * step + 1
        places = torch.randperm(S * width).reshape(S, width) * step + torch.randint(step, ())

        def arena(like: Tensor, columns: int) -> Tensor:
            size = P * cls.UNIT + page * columns + shift
            memory = torch.full((size,), math.nan, dtype=like.dtype)[shift:]
            return memory.as_strided((P, page, columns), (cls.UNIT, max(columns, 1), 1), shift)

        A, B = arena(b.A, K), arena(b.B, N)
        table = torch.randint(0, P, (S, width))
        table[torch.rand(S, width) < 0.5] = ABSENT[int(torch.randint(3, ()))]
        for slot, r in enumerate(b.ranks.tolist()):
            for rank in range(r):
                place = table[slot, rank // page] = places[slot, rank // page]
                A[place, rank % page] = b.A[slot, rank]
                B[place, rank % page] = b.B[slot, :, rank]
        return cls(A, B, table.to(torch.int32))


def options(b: Batch) -> dict[str, Any]:
    return {"ranks": b.ranks, "row_scales": b.row_scales}


def call_linear(b: Batch, bank: Bank | None = None) -> Tensor:
    A, B, table = bank or (b.A, b.B, None)
    given, how = (b.x, b.weight, A, B, b.ids, b.scalings), options(b)
    return F.multi_lora_linear(*given, bias=b.bias, page_table=table, **how)


def call_add(b: Batch, bank: Bank | None, y: Tensor) -> Tensor:
    A, B, table = bank or (b.A, b.B, None)
    given = (y.clone(), b.x, A, B, b.ids, b.scalings)
    return F.multi_lora_add_(*given, page_table=table, **options(b))


def fused_product(b: Batch, bank: Bank | None) -> Tensor:
    """The native product with the adapters, for any number of rows."""
    y, h = (b.x.new_empty(len(b.x), size) for size in (b.weight.shape[0], b.A.shape[1]))
    if bank is None:
        cpu_multi.run_multi(y, h, b.x, b.weight, b.bias, b.adapters, b.routing)
    else:
        pages = Adapters(bank.A, bank.B.mT, bank.table)
        cpu_multi.run_multi(y, None, b.x, b.weight, b.bias, pages, b.routing)
    return y


@pytest.mark.parametrize("page, R", [(1, 3), (4, 8), (8, 16), (8, 13), (4, 30), (8, 64), (16, 9)])
@pytest.mark.parametrize("dtype, lora_dtype", KINDS)
def test_pages_give_bits_of_dense_form(dtype, lora_dtype, page, R, instruction_set):
    """Against the oracle too; one row, a few of an adapter, more than a block, and odd sizes."""
    for T, K, N, shift in ((1, 1, 1, 0), (3, 63, 431, 1), (40, 33, 63, 3), (7, 1128, 150, 0)):
        b = Batch.draw(T, K, N, R, 4, dtype, lora_dtype, CPU)
        if T == 3:
            b = b._replace(ids=torch.tensor([0, -1, 1]))
        bank = Bank.of(b, page, shift)
        y = signed(T, N, dtype=dtype, device=CPU)
        with unchanged(b, bank.table):
            got = call_linear(b, bank)
            assert_accurate(got, b.want(), b.unfused(), dtype, tokens=T)
            assert same_bits(got, call_linear(b))
            assert same_bits(fused_product(b, bank), fused_product(b, None))
            assert same_bits(call_add(b, bank, y), call_add(b, None, y))


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_paged_linear_rounds_few_rows_once(dtype, instruction_set):
    """With a weight the base's sums and the adapter's meet in float32."""
    b = Batch.draw(5, 64, 48, 8, 3, dtype, dtype, CPU)
    bank = Bank.of(b, 4)
    once = fused_product(b, bank)
    twice = call_add(b, bank, nnf.linear(b.x, b.weight, b.bias))
    # In float32 they may be alike: the order of the library's sums is its own.
    assert dtype == F32 or not same_bits(once, twice)
    assert same_bits(
        call_linear(b, bank), once if cpu_multi.few(5, b.weight, "multi_lora_linear") else twice
    )


@pytest.mark.parametrize("page", [1, 4, 8])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_missing_pages_count_as_zero(dtype, page, instruction_set):
    """Hold nothing, wherever a slot's table has them; other slots do not notice."""
    R = 16
    b = Batch.draw(11, 67, 83, R, 3, dtype, dtype, CPU)
    b = b._replace(ranks=torch.tensor([R, R, 7]), ids=torch.arange(11) % 4 - 1)
    b.A[torch.isnan(b.A)], b.B[torch.isnan(b.B)] = 0.5, 0.25
    bank = Bank.of(b, page)
    before, y = call_linear(b, bank), signed(11, 83, dtype=dtype, device=CPU)
    for absent in (*ABSENT, bank.A.shape[0]):
        table, without = bank.table.clone(), b._replace(A=b.A.clone(), B=b.B.clone())
        for slot, at in ((0, 0), (1, R // page - 1)):
            table[slot, at] = absent
            without.A[slot, at * page : (at + 1) * page] = 0
        got = call_linear(b, bank._replace(table=table))
        assert_accurate(got, without.want(), without.unfused(), dtype)
        others = (b.ids != 0) & (b.ids != 1)
        assert same_bits(got[others], before[others])
        gone = bank._replace(table=torch.full_like(table, absent))
        assert same_bits(call_add(b, gone, y), y)
    none = Bank(bank.A[:0], bank.B[:0], bank.table)
    assert same_bits(call_add(b, none, y), y)


def test_nan_in_other_slots_reaches_no_row(instruction_set):
    """Slots that rows use, and slots that none does."""
    b = Batch.draw(12, 67, 83, 16, 4, BF16, F32, CPU)
    b = b._replace(ranks=torch.tensor([16, 5, 16, 12]), ids=torch.arange(12) % 4 - 1)
    b.A[torch.isnan(b.A)], b.B[torch.isnan(b.B)] = 0.5, 0.25
    clean = call_linear(b, Bank.of(b, 8))
    for poison in (math.nan, math.inf):
        ill = b._replace(A=b.A.clone(), B=b.B.clone())
        ill.A[2], ill.B[2] = poison, poison
        ill.A[3], ill.B[3] = poison, poison  # nobody's
        got = call_linear(ill, Bank.of(ill, 8))
        assert not got[b.ids == 2].isfinite().any()
        assert same_bits(got[b.ids != 2], clean[b.ids != 2])


@pytest.mark.parametrize("R", [5, 8, 16, 24])
@pytest.mark.parametrize("dtype, lora_dtype", KINDS)
def test_paged_row_has_same_bits_in_any_batch(dtype, lora_dtype, R, instruction_set):
    b = Batch.draw(39, 67, 211, R, 4, dtype, lora_dtype, CPU)
    b = b._replace(ids=torch.arange(39) // 9 - 1)
    bank, y = Bank.of(b, 8), signed(39, 211, dtype=dtype, device=CPU)
    all_added, all_fused = call_add(b, bank, y), fused_product(b, bank)
    for rows in (*torch.arange(39).split(1), torch.randperm(39), torch.arange(3, 30, 5)):
        own = b.rows(rows)
        assert same_bits(call_add(own, bank, y[rows]), all_added[rows])
        assert same_bits(fused_product(own, bank), all_fused[rows])


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_paged_bits_do_not_depend_on_threads(dtype, instruction_set):
    b = Batch.draw(70, 130, 300, 24, 5, dtype, dtype, CPU)
    y = signed(70, 300, dtype=dtype, device=CPU)
    few = b.rows(torch.arange(3))
    bank, results = Bank.of(b, 8), []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        try:
            results.append(
                (
                    call_add(b, bank, y),
                    fused_product(b, bank),
                    call_add(few, bank, y[:3]),
                    fused_product(few, bank),
                )
            )
        finally:
            torch.set_num_threads(1)
    for other in results[1:]:
        assert all(same_bits(one, more) for one, more in zip(results[0], other, strict=True))


@pytest.mark.parametrize("slices", [None, (11, 40, 32)])
def test_paged_call_allocates_nothing_per_adapter(slices):
    """What a call allocates does not grow with the adapters."""
    T, K, N, R = 4, 24, 83, 64
    C = len(slices or [1])
    x, weight = torch.randn(T, K), torch.randn(N, K)
    table = torch.arange(4 * 8, dtype=torch.int32).view(4, 8)
    A, B = torch.randn(32, C * 8, K), torch.randn(32, 8, N)
    groups, scalings = F.group_rows(torch.arange(T), 4), torch.ones(4)
    how = {"slices": slices, "page_table": table}
    for rows in (weight, weight.T.contiguous().T):  # fused, and with torch's product
        with torch.no_grad(), Spy() as spy:
            y = F.multi_lora_linear(x, rows, A, B, groups, scalings, **how)
            F.multi_lora_add_(y, x, A, B, groups, scalings, **how)
        assert spy.sizes()[0] <= T * N < R * K


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_pages_are_read_past_2_to_the_31(dtype, instruction_set):
    """Pages that overlap, all but a few of them untouched memory: offsets are 64-bit."""
    b = Batch.draw(6, 70, 90, 8, 2, dtype, dtype, CPU)
    b = b._replace(ranks=torch.tensor([8, 8]))
    b.A[torch.isnan(b.A)], b.B[torch.isnan(b.B)] = 0.5, 0.25
    unit, last = 64, 2**25 + 3  # the last page begins past 2^31 elements
    parts = []
    for own, columns in ((b.A, 70), (b.B.transpose(1, 2), 90)):
        memory = torch.empty(last * unit + 8 * columns, dtype=dtype)
        pages = memory.as_strided((last + 1, 8, columns), (unit, columns, 1))
        pages[last], pages[5] = own[0], own[1]
        parts.append(pages)
    bank = Bank(parts[0], parts[1], torch.tensor([[last], [5]], dtype=torch.int32))
    assert same_bits(call_linear(b, bank), call_linear(b))


@pytest.mark.parametrize("threads", [1, 3])
def test_paged_add_refuses_non_finite_scaling(threads):
    """Raises, names the slot and leaves y; nobody's does not matter."""
    b = Batch.draw(6, 19, 37, 6, 4, F32, F32, CPU)
    b = b._replace(ids=torch.tensor([2, 0, 2, -1, 0, 2]), scalings=torch.ones(4))
    bank, y = Bank.of(b, 4), torch.randn(6, 37)
    want = call_add(b, bank, y)
    b.scalings[1] = b.scalings[3] = math.nan
    assert same_bits(call_add(b, bank, y), want)
    b.scalings[2] = math.inf
    torch.set_num_threads(threads)
    try:
        given = (b.x, bank.A, bank.B, b.ids, b.scalings)
        how = {**options(b), "page_table": bank.table}
        with unchanged(y), pytest.raises(ValueError, match=r"scalings: .* got inf for slot 2"):
            F.multi_lora_add_(y, *given, **how)
        with pytest.raises(ValueError, match=r"scalings: .* got inf for slot 2"):
            call_linear(b, bank)
    finally:
        torch.set_num_threads(1)


def pages_with_rows_apart(pages: Tensor) -> Tensor:
    """The same pages, NaN between every two ranks."""
    wide = pages.new_full((len(pages), 2 * pages.shape[1], pages.shape[2]), math.nan)
    wide[:, ::2] = pages
    return wide[:, ::2]


@pytest.mark.parametrize("lay", ["columns of A", "columns of B", "the table", "rows of pages"])
def test_paged_linear_accepts_pages_of_any_strides(lay):
    b = Batch.draw(6, 19, 37, 6, 4, F32, F32, CPU)
    bank = Bank.of(b, 4)
    want = call_linear(b, bank)
    if lay == "columns of A":
        bank = bank._replace(A=bank.A.mT.contiguous().mT)
    elif lay == "columns of B":
        bank = bank._replace(B=bank.B.mT.contiguous().mT)
    elif lay == "the table":
        bank = bank._replace(table=bank.table.T.contiguous().T)
    else:
        bank = bank._replace(A=pages_with_rows_apart(bank.A), B=pages_with_rows_apart(bank.B))
    assert same_bits(call_linear(b, bank), want)


@pytest.mark.parametrize("T, K, N, S, pages, page", [
    (0, 5, 7, 2, 2, 4), (3, 0, 7, 2, 2, 4), (3, 5, 0, 2, 2, 4), (3, 5, 7, 0, 2, 4),
    (3, 5, 7, 2, 0, 4), (3, 5, 7, 2, 2, 0),
])  # fmt: skip
def test_paged_linear_accepts_empty_dimensions(T, K, N, S, pages, page, instruction_set):
    x, weight = torch.randn(T, K), torch.randn(N, K)
    A, B = torch.randn(6, page, K), torch.randn(6, page, N)
    table = torch.randint(0, 6, (S, pages), dtype=torch.int32)
    ids = torch.arange(T) % S if S else torch.full((T,), -1)
    y = F.multi_lora_linear(x, weight, A, B, ids, torch.ones(S), page_table=table)
    want = x @ weight.T
    if S and pages and page and K:
        ranks = table[ids].long()
        h = torch.einsum("tk,tprk->tpr", x, A[ranks])
        want = want + torch.einsum("tpr,tprn->tn", h, B[ranks])
    torch.testing.assert_close(y, want)
    assert y.shape == (T, N)
