"""Packed projections and adapters in pages, as functions, on every backend."""

import pytest
import torch
from torch.nn import functional as nnf

import fastlora
from fastlora import functional as F
from tests.support import oracle
from tests.support.adapters_in_batches import Batch, Paged
from tests.support.helpers import assert_accurate, leaves, same_bits, signed, unchanged

WIDTHS, ENDS = (21, 8, 8), (21, 29, 37)
N, R, S = sum(WIDTHS), 5, 4
F32 = torch.float32


def draw_packed_batch(dtype, device, T=11, K=19):
    """A batch and lora_A (S, 3 R, K), other ranks for every slice of a slot's."""
    b = Batch.draw(T, K, N, R, S, dtype, dtype, device)
    A = torch.cat([b.A, -0.5 * b.A.flip(2), 2 * b.A.roll(1, 2)], 1)
    return b, A


def call_per_slice(b: Batch, A, through):
    """What ``through`` makes of every slice by itself."""
    parts = []
    for i, (width, end) in enumerate(zip(WIDTHS, ENDS, strict=True)):
        columns = slice(end - width, end)
        own = b._replace(
            A=A[:, i * R : (i + 1) * R], B=b.B[:, columns], weight=b.weight[columns],
            bias=b.bias[columns],
        )  # fmt: skip
        parts.append(through(own))
    return torch.cat(parts, 1)


def options(b: Batch) -> dict:
    return {"ranks": b.ranks, "row_scales": b.row_scales}


def call(b: Batch, A, B, **how):
    return F.multi_lora_linear(
        b.x, b.weight, A, B, b.ids, b.scalings, bias=b.bias, **options(b), **how
    )


@pytest.mark.parametrize("page", [0, 2])
@pytest.mark.parametrize("sliced", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_packed_linear_matches_oracle_per_slice(dtype, sliced, page, backend, device):
    """Against the oracle, a slice at a time; from pages the bits of the dense form."""
    b, A = draw_packed_batch(dtype, device)
    A = A if sliced else b.A
    through = (lambda f: call_per_slice(b, A, f)) if sliced else (lambda f: f(b))
    how = {"slices": WIDTHS} if sliced else {}
    want, unfused = through(Batch.want), through(Batch.unfused)
    y = call(b, A, b.B, **how)
    assert_accurate(y, want, unfused, dtype)
    own = signed(*y.shape, dtype=dtype, device=device)
    base = oracle.lora_linear(b.x, b.weight, b.x[:0], b.weight[:, :0], 0.0, bias=b.bias)
    if page:
        p = Paged.of(A, b.B, b.ranks, page, len(WIDTHS) if sliced else 1)
        A, B, how = p.A, p.B, {**how, "page_table": p.table}
        with unchanged(b, A, B, p.table):
            paged = call(b, A, B, **how)
        # Another order of the same sums is what plain torch's products may take.
        assert_accurate(paged, want, unfused, dtype)
        assert same_bits(paged, y) or backend == "torch"
    else:
        B = b.B
    added = own.clone()
    given = (added, b.x, A, B, b.ids, b.scalings)
    assert F.multi_lora_add_(*given, **options(b), **how) is added
    assert_accurate(added, own.cpu().double() + want - base, unfused, dtype)


def test_packed_gradients_equal_those_per_slice(backend, device):
    b, A = draw_packed_batch(F32, device)
    # Past a slot's rank there is NaN, whose gradient is 0.
    tensors = {"x": b.x, "weight": b.weight, "bias": b.bias, "A": A, "B": b.B}
    dy = signed(11, N, dtype=F32, device=device)
    packed, apart, added = leaves(tensors), leaves(tensors), leaves(tensors)

    def batch(t):
        return b._replace(x=t["x"], weight=t["weight"], bias=t["bias"], B=t["B"])

    def alone(own):
        given = (own.x, own.weight, own.A, own.B, own.ids, own.scalings)
        return F.multi_lora_linear(*given, bias=own.bias, **options(own))

    results = [
        call(batch(packed), packed["A"], packed["B"], slices=WIDTHS),
        call_per_slice(batch(apart), apart["A"], alone),
        F.multi_lora_add_(
            nnf.linear(added["x"], added["weight"], added["bias"]), added["x"], added["A"],
            added["B"], b.ids, b.scalings, **options(b), slices=WIDTHS,
        ),
    ]  # fmt: skip
    for y in results:
        torch.testing.assert_close(y, results[0])
        y.backward(dy)
    for name in tensors:
        assert packed[name].grad.isfinite().all()
        for other in (apart, added):
            torch.testing.assert_close(other[name].grad, packed[name].grad)


@pytest.mark.parametrize("tracked", [False, True])
@pytest.mark.parametrize("overlap", ["the same", "in part"])
def test_packed_add_accepts_y_sharing_xs_memory(overlap, tracked, backend, device):
    """Every slice sees x as it was."""
    b, A = draw_packed_batch(F32, device, K=N)
    buffer = torch.cat([b.x, b.x[:, :4]], 1)
    x = buffer[:, :N]
    y = x if overlap == "the same" else buffer[:, 4:]
    own, A = y.clone(), A.requires_grad_(tracked)
    given = (A, b.B, b.ids, b.scalings)
    apart = F.multi_lora_add_(own, b.x.clone(), *given, **options(b), slices=WIDTHS)
    got = F.multi_lora_add_(y, x, *given, **options(b), slices=WIDTHS)
    torch.testing.assert_close(got, apart)


def test_packed_linear_accepts_sequences_and_row_groups(backend, device):
    """x (B, L, K) with an id a sequence; y a view of something larger."""
    b, A = draw_packed_batch(F32, device, T=6)
    x, ids = b.x.view(3, 2, -1), b.ids[:3]
    groups = F.group_rows(ids, S)
    p = Paged.of(A, b.B, b.ranks, 2, 3)
    how = {"slices": WIDTHS, "page_table": p.table, "ranks": b.ranks}
    y = F.multi_lora_linear(x, b.weight, p.A, p.B, groups, b.scalings, **how)
    flat = F.multi_lora_linear(b.x, b.weight, p.A, p.B, ids.repeat_interleave(2), b.scalings, **how)
    assert same_bits(y, flat.view(3, 2, N))
    wide = signed(3, 2, 2 * N, dtype=F32, device=device)
    onto, rest = wide[..., :N], wide[..., N:].clone()
    want = nnf.linear(x, b.weight)
    onto.copy_(want)
    F.multi_lora_add_(onto, x, p.A, p.B, groups, b.scalings, **how)
    torch.testing.assert_close(wide[..., :N], y)
    assert same_bits(wide[..., N:], rest)


def test_page_table_entries_out_of_range_are_ignored(backend, device):
    """Entries out of range, and pages past a slot's rank, are never followed."""
    b, _ = draw_packed_batch(F32, device)
    b = b._replace(ids=torch.arange(11, device=device) % (S + 1) - 1)
    p = Paged.of(b.A, b.B, b.ranks, 2)
    y = call(b, p.A, p.B, page_table=p.table)
    wild = p.table.clone()
    used = torch.arange(wild.shape[1], device=device) * 2 < b.ranks[:, None]
    wild[~used] = torch.randint(-(2**31), 2**31 - 1, (int((~used).sum()),)).to(wild)
    assert same_bits(call(b, p.A, p.B, page_table=wild), y)
    # A page that is wanted and is not there holds nothing, rather than another adapter's ranks.
    some = b.ids == 0
    base = nnf.linear(b.x[some], b.weight, b.bias)
    for absent in (len(p.A), -1, 2**31 - 1, -(2**31)):
        gone = p.table.clone()
        gone[0] = absent
        lost = call(b, p.A, p.B, page_table=gone)
        assert same_bits(lost[~some], y[~some])
        torch.testing.assert_close(lost[some], base)
    none = call(b, p.A[:0], p.B[:0], page_table=torch.full_like(p.table, -1))
    torch.testing.assert_close(none, nnf.linear(b.x, b.weight, b.bias))


def test_packed_rows_are_batch_invariant(backend, device):
    b, A = draw_packed_batch(F32, device, T=13)
    p = Paged.of(A, b.B, b.ranks, 2, 3)
    how = {"slices": WIDTHS, "page_table": p.table}
    with fastlora.batch_invariant():
        whole = call(b, p.A, p.B, **how)
        for rows in (torch.tensor([4]), torch.tensor([9, 2]), torch.randperm(13)):
            assert same_bits(call(b.rows(rows.to(device)), p.A, p.B, **how), whole[rows])


def test_packed_functions_compile_with_eager_results(backend):
    b, A = draw_packed_batch(F32, torch.device("cpu"))
    p = Paged.of(A, b.B, b.ranks, 2, 3)
    groups = b.groups

    def f(x, onto):
        how = {"slices": WIDTHS, "page_table": p.table, **options(b)}
        y = F.multi_lora_linear(x, b.weight, p.A, p.B, groups, b.scalings, **how)
        return y, F.multi_lora_add_(onto.clone(), x, p.A, p.B, groups, b.scalings, **how)

    torch.compiler.reset()
    with torch.no_grad():
        own = signed(11, N, dtype=F32, device=b.x.device)
        compiled = torch.compile(f, fullgraph=True)(b.x, own)
        for ours, eager in zip(compiled, f(b.x, own), strict=True):
            torch.testing.assert_close(ours, eager)


def test_packed_linear_follows_autocast(backend, device):
    if backend == "torch" and device.type == "cpu":
        pytest.skip("autocast is the functions' own: one backend shows it")
    b, A = draw_packed_batch(F32, device)
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
        y = call(b, A, b.B, slices=WIDTHS)
    assert y.dtype == torch.bfloat16
    want = call_per_slice(b, A, Batch.want)
    assert oracle.relative_error(y, want) < 2e-2


def test_pages_that_require_grad_are_refused(device):
    b, _ = draw_packed_batch(F32, device)
    p = Paged.of(b.A, b.B, b.ranks, 2)
    y = torch.zeros(11, N, device=device)
    for leaf in (b.x, p.A, p.B):
        leaf.requires_grad_()
        with pytest.raises(ValueError, match="page_table: adapters in pages are not differen"):
            call(b, p.A, p.B, page_table=p.table)
        with unchanged(y), pytest.raises(ValueError, match="page_table"):
            F.multi_lora_add_(y, b.x, p.A, p.B, b.ids, b.scalings, page_table=p.table)
        leaf.requires_grad_(False)
    with torch.no_grad():
        call(b, p.A.requires_grad_(), p.B, page_table=p.table)


@pytest.mark.parametrize(
    "change, error, message",
    [
        (
            {"slices": (21, 8)},
            ValueError,
            r"slices: expected widths from 1 that add up to 37, got \[",
        ),
        ({"slices": (37, 0)}, ValueError, "slices: expected widths"),
        ({"slices": (36.5, 0.5)}, TypeError, "slices: expected a sequence of ints, got"),
        ({"slices": (36, True)}, TypeError, "slices: expected a sequence of ints, got"),
        ({"slices": 37}, TypeError, "slices: expected a sequence of ints, got int"),
        ({"slices": ()}, ValueError, "slices: expected widths"),
        ({"slices": (21, 16)}, ValueError, r"lora_A: expected shape \(4, 10, 19\), 5 ranks for"),
        ({"B": torch.zeros(4, 36, 5)}, ValueError, r"lora_B: .*\(S, 37, R\), got|slices: .* 36"),
        ({"B": torch.zeros(4, 37)}, ValueError, r"lora_B: expected shape \(S, (37|N), R\), got"),
        ({"A": torch.zeros(4, 15, 18)}, ValueError, r"lora_A: .*\(4, 15, 19\)|x: .*18\)"),
        ({"A": torch.zeros(4, 15, 19).half()}, TypeError, "lora_B: expected lora_A's dtype"),
        ({"A": [1]}, TypeError, "lora_A: expected a torch.Tensor"),
        ({"bias": torch.zeros(3)}, ValueError, r"bias: expected shape \(37,\)"),
        ({"scalings": torch.ones(3)}, ValueError, r"scalings: expected shape \(4,\)"),
        ({"ranks": torch.ones(4)}, TypeError, "ranks: expected int32 or int64"),
        ({"page_table": torch.zeros(4, 2)}, TypeError, "page_table: expected int32, got"),
        ({"page_table": [[0]]}, TypeError, "page_table: expected a torch.Tensor"),
        (
            {"page_table": torch.zeros(4, 2, dtype=torch.int32)},
            ValueError,
            r"lora_B: expected shape \(P, page, 37\), got|slices: .* 5",
        ),
        (
            {"page_table": torch.zeros(4, dtype=torch.int32), "B": torch.zeros(4, 5, 37)},
            ValueError,
            r"page_table: expected shape \(S, pages a slot\), got \(4,\)",
        ),
        (
            {"page_table": torch.zeros(3, 2, dtype=torch.int32), "B": torch.zeros(4, 5, 37)},
            ValueError,
            r"scalings: expected shape \(3,\)",
        ),
    ],
)
def test_packed_linear_names_argument_that_does_not_fit(change, error, message):
    b, A = draw_packed_batch(F32, torch.device("cpu"))
    given = {"A": A, "B": b.B, "scalings": b.scalings, "bias": None, "slices": WIDTHS, **change}
    rest = {k: given[k] for k in ("slices", "ranks", "page_table") if k in given}
    factors = (given["A"], given["B"], b.ids, given["scalings"])
    with pytest.raises(error, match=message):
        F.multi_lora_linear(b.x, b.weight, *factors, bias=given["bias"], **rest)
    if "bias" not in change:
        y = torch.zeros(11, N)
        with unchanged(y), pytest.raises(error, match=message):
            F.multi_lora_add_(y, b.x, *factors, **rest)


def test_packed_add_names_y_that_does_not_fit():
    b, A = draw_packed_batch(F32, torch.device("cpu"))
    given = (A, b.B, b.ids, b.scalings)
    for y, x, error, message in (
        (torch.zeros(11, N - 1), b.x, ValueError, r"y: expected shape \(11, 37\)"),
        (torch.zeros(()), b.x, ValueError, "y: expected shape"),
        (torch.zeros(11, N).half(), b.x, TypeError, "x: expected y's dtype torch.float16"),
        (torch.zeros(11, N), b.x[:, 1:], ValueError, r"x: expected shape \(..., 19\)"),
        (torch.zeros(1, N).expand(11, N), b.x, ValueError, "y: expected elements of their own"),
    ):
        with unchanged(y), pytest.raises(error, match=message):
            F.multi_lora_add_(y, x, *given, slices=WIDTHS)
