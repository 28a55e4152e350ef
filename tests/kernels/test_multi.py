"""The Triton kernels for many adapters, along each path and in many tiles, against the oracle."""

import os

import pytest
import torch

from fastlora import functional as F
from fastlora.backends.values import Adapters, Rows
from tests.support import forks, oracle
from tests.support.adapters_in_batches import Batch, Paged
from tests.support.helpers import (
    DTYPES,
    LAYOUTS,
    assert_accurate,
    contiguous,
    misaligned,
    multi_lora_linear,
    same_bits,
    signed,
)

pytest.importorskip("triton", reason="triton is not installed")

from fastlora.backends.triton import multi, multi_product
from fastlora.kernels.choose import choice, ledger
from fastlora.kernels.choose.ledger import MULTI_PATHS, Problem
from fastlora.kernels.multi import gemm as multi_gemm
from fastlora.kernels.tile import configs, launch, numerics
from tests.support.multi_paths import on_every_path

# T, K, N, R, S; K of several parts, more ranks than a step, many tiles, aligned rows.
SHAPES = [
    (1, 63, 65, 4, 3),
    (33, 40, 72, 40, 9),
    (70, 16, 24, 8, 3),
    (19, 5, 129, 16, 40),
    (49, 64, 80, 24, 4),
]
SPLIT = (7, 1128, 9, 3, 2)
# Nothing to do, in every direction.
EMPTY = [(0, 5, 7, 2, 3), (3, 0, 7, 2, 3), (3, 5, 0, 2, 3), (3, 5, 7, 0, 3), (3, 5, 7, 2, 0)]
TINY = {
    "multi_shrink": configs.Shrink(16, 16, 4, 2),
    "multi_expand": configs.Expand(16, 16, 4),
    "multi_decode": configs.Decode(16, 16, 16, 4, 2),
    "multi_gemm": configs.Gemm(16, 16, 16, 2, 4, 2),
    "multi_gemm_tma": configs.Gemm(16, 16, 16, 2, 4, 2),
    "multi_gradient": configs.Gradient(16, 16, 4, 2),
}

dtypes = pytest.mark.parametrize(
    "dtype, lora_dtype",
    [pair for name, pair in DTYPES.items() if name != "fp64"],
    ids=[name for name in DTYPES if name != "fp64"],
)
F32 = torch.float32
pytestmark = pytest.mark.usefixtures("triton_usable", "memory_holds_nan")


@pytest.fixture(params=["tiny", "default"])
def tiles(request, monkeypatch) -> str:
    if request.param == "tiny":
        for module in (multi_product, multi):
            monkeypatch.setattr(module, "config_of", lambda kernel, *_: TINY[kernel])
    return request.param


def assert_right(b: Batch, path: str, layout=contiguous) -> None:
    """Output, h and all five gradients."""
    x, weight, bias, A, B = (layout(t) for t in (b.x, b.weight, b.bias, b.A, b.B))
    dtype, unfused, want = x.dtype, b.unfused(), b.want()
    adapters = Adapters(A, B)
    y, h = multi.multi_lora_linear(x, weight, bias, adapters, b.routing, path=path)
    assert_accurate(y, want, unfused, dtype)
    b.assert_h(h)
    own = signed(*y.shape, dtype=dtype, device=y.device)
    added, h2 = layout(own), torch.empty_like(h)
    multi.multi_lora_add_(added, h2, x, adapters, b.routing)
    delta = (
        own.cpu().double()
        + want
        - oracle.multi_lora_linear(
            b.x, b.weight, b.A, b.B, torch.full_like(b.ids, -1), b.scalings, bias=b.bias
        )
    )
    assert_accurate(added, delta, unfused, dtype)
    assert same_bits(h2, h)


@on_every_path
@pytest.mark.parametrize("T, K, N, R, S", SHAPES)
def test_multi_path_matches_oracle_with_gradients(T, K, N, R, S, path, device):
    assert_right(Batch.draw(T, K, N, R, S, F32, F32, device), path)


@dtypes
@on_every_path
@pytest.mark.parametrize("T, K, N, R, S", [SHAPES[0], SPLIT])
def test_multi_path_matches_oracle_in_every_dtype(T, K, N, R, S, path, dtype, lora_dtype, device):
    assert_right(Batch.draw(T, K, N, R, S, dtype, lora_dtype, device), path)


@on_every_path
@pytest.mark.parametrize("T, K, N, R, S", EMPTY)
def test_multi_path_accepts_empty_dimensions(T, K, N, R, S, path, device):
    assert_right(Batch.draw(T, K, N, R, S, F32, F32, device), path)


@on_every_path
@pytest.mark.parametrize("layout", LAYOUTS)
def test_multi_path_reads_operands_of_any_layout(path, layout, device):
    """NaN lies around and between the elements of some."""
    assert_right(Batch.draw(19, 37, 29, 5, 3, F32, F32, device), path, layout)


@on_every_path
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_multi_path_is_right_across_many_tiles(path, dtype, tiles, device):
    assert_right(Batch.draw(35, 37, 41, 21, 5, dtype, dtype, device), path)


@on_every_path
@pytest.mark.parametrize("tiles", ["tiny"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_multi_gradients_match_oracle_along_each_path(path, dtype, tiles, device):
    """Forward's other direction along each path, and the sums over each adapter's rows."""
    b = Batch.draw(35, 24, 40, 9, 4, dtype, F32, device)
    dy = signed(35, 40, dtype=dtype, device=device)
    x, weight, bias, A, B = (t.clone().requires_grad_() for t in b[:5])
    how = {"bias": bias, "ranks": b.ranks, "row_scales": b.row_scales}
    multi_lora_linear(x, weight, A, B, b.ids, b.scalings, **how).backward(dy)
    h = torch.zeros(35, 9, dtype=dtype, device=device)
    for row, slot in enumerate(b.ids.tolist()):
        r = int(b.ranks[slot]) if slot >= 0 else 0
        h[row, :r] = (b.A[slot, :r].double() @ b.x[row].double()).to(dtype)
    given = (dy, b.x, b.weight, b.adapters, h, b.routing)
    grads = multi.multi_lora_linear_backward(*given, [True] * 5, path)
    how = {"ranks": b.ranks, "row_scales": b.row_scales}
    want = oracle.multi_lora_grads(dy, b.x, b.weight, b.A, b.B, b.ids, b.scalings, **how)
    assert [g.dtype for g in grads] == [t.dtype for t in b[:5]]
    for got, name, leaf in zip(
        (grads[0], *grads[3:]), ("x", "lora_A", "lora_B"), (x, A, B), strict=True
    ):
        assert_accurate(got, want[name], leaf.grad.nan_to_num(), dtype, tokens=1)
    for needs in ([True, False, False, False, False], [False, False, False, True, True]):
        some = multi.multi_lora_linear_backward(*given, needs, path)
        asked = [grad for grad, need in zip(grads, needs, strict=True) if need]
        assert all(same_bits(a, b) for a, b in zip(some, asked, strict=True))
    without = multi.multi_lora_linear_backward(dy, b.x, None, *given[3:], [True] + [False] * 4)
    base = oracle.multi_lora_grads(dy, b.x, None, b.A, b.B, b.ids, b.scalings, **how)["x"]
    assert_accurate(without[0], base, without[0], dtype, tokens=1)


def test_aligned_rows_are_read_by_descriptors(device, monkeypatch):
    """And others by the pointer twin, as are slices whose ends no tile ends at."""
    if launch.arch_of(device) < 90:
        pytest.skip("tensor descriptors are for Hopper and later")
    taken, real = [], multi_gemm.multi_gemm
    spied = lambda *a, **k: (taken.append(k["tma"]), real(*a, **k))  # noqa: E731
    monkeypatch.setattr(multi_product, "multi_gemm", spied)
    for K, N, ends, want in (
        (64, 384, (384,), True),
        (63, 384, (384,), False),
        (64, 384, (128, 384), True),
        (64, 384, (64, 384), False),
    ):
        b = Batch.draw(20, K, N, 4, 3, torch.bfloat16, F32, device)
        A = b.A.repeat(1, len(ends), 1)
        for x in (b.x, misaligned(b.x)):
            given = (x, b.weight, b.bias, Adapters(A, b.B, None, ends), b.routing)
            y = multi.packed_lora_linear(*given, path="prefill")
            assert_accurate(y, b.want(), b.unfused(), torch.bfloat16)
        assert taken == [want, False]
        taken.clear()


@on_every_path
@pytest.mark.parametrize("page, dtype", [(1, F32), (4, torch.bfloat16), (16, F32)])
def test_pages_give_the_bits_of_the_dense_form(path, page, dtype, device):
    b = Batch.draw(37, 40, 50, 12, 6, dtype, dtype, device)
    dense, _ = multi.multi_lora_linear(b.x, b.weight, b.bias, b.adapters, b.routing, path=path)
    p = Paged.of(b.A, b.B, b.ranks, page)
    given = (Adapters(p.A, p.B.transpose(1, 2), p.table, (50,)), b.routing)
    assert same_bits(multi.packed_lora_linear(b.x, b.weight, b.bias, *given, path=path), dense)


@on_every_path
@pytest.mark.parametrize("tiles", ["tiny"], indirect=True)
@pytest.mark.parametrize(
    "dtype", [pytest.param(torch.float32, marks=pytest.mark.full), torch.float16]
)
def test_slices_give_the_bits_of_each_alone(path, dtype, tiles, device):
    """q, k and v of unequal widths: one launch, three products' bits, along one path."""
    widths, R, S = (40, 17, 9), 5, 4
    b = Batch.draw(21, 33, sum(widths), R, S, dtype, dtype, device)
    A = b.A.repeat(1, 3, 1)
    A[:, R:] *= torch.linspace(-1, 1, 2 * R, device=device, dtype=dtype)[:, None]
    ends = (40, 57, 66)
    adapters = Adapters(A, b.B, None, ends)
    y = multi.packed_lora_linear(b.x, b.weight, b.bias, adapters, b.routing, path=path)
    own = signed(*y.shape, dtype=dtype, device=device)
    added = own.clone()
    multi.packed_lora_add_(added, b.x, adapters, b.routing)
    for i, (begin, end) in enumerate(zip((0, 40, 57), ends, strict=True)):
        columns, mine = slice(begin, end), A[:, i * R : (i + 1) * R]
        part = Adapters(mine, b.B[:, columns])
        base = (b.weight[columns], b.bias[columns])
        alone, h = multi.multi_lora_linear(b.x, *base, part, b.routing, path=path)
        # The library may take another of its kernels for another width.
        assert same_bits(y[:, columns], alone) or path == "library"
        onto = own[:, columns].clone()
        multi.multi_lora_add_(onto, h, b.x, part, b.routing)
        assert same_bits(added[:, columns], onto)
    torch.testing.assert_close(y.float(), _by_slices(b, A, ends), rtol=2e-2, atol=2e-2)


def _by_slices(b: Batch, A, ends):
    R, parts = b.A.shape[1], []
    for i, (begin, end) in enumerate(zip((0, *ends), ends, strict=False)):
        mine = b._replace(
            A=A[:, i * R : (i + 1) * R], B=b.B[:, begin:end], weight=b.weight[begin:end],
            bias=b.bias[begin:end],
        )  # fmt: skip
        parts.append(mine.want())
    return torch.cat(parts, 1).float().to(b.x.device)


def test_large_scaling_does_not_overflow_float16(device):
    """h fits float16, scaling * h does not, y does: the factor meets the float32 sum alone."""
    x = torch.full((4, 16), 60.0, dtype=torch.float16, device=device)
    weight = torch.zeros(8, 16, dtype=torch.float16, device=device)
    A, B = torch.full((1, 2, 16), 30.0), torch.full((1, 8, 2), 1e-4)
    A, B = (t.to(x) for t in (A, B))
    groups = F.group_rows(torch.zeros(4, dtype=torch.int64, device=device), 1)
    scalings = torch.full((1,), 64.0, device=device)
    want = 64.0 * x.double() @ A[0].double().T @ B[0].double().T
    for path in ("decode", "prefill", "library"):
        rows = Rows(*groups.tensors, scalings, None, None)
        y, h = multi.multi_lora_linear(x, weight, None, Adapters(A, B), rows, path=path)
        assert h.max() * 64 > torch.finfo(torch.float16).max
        assert oracle.relative_error(y, want) < 1e-3


def test_multi_lora_linear_refuses_impossible_path(device):
    b = Batch.draw(3, 8, 8, 2, 2, F32, F32, device)
    for path in ("added", "one_pass", "nonsense"):
        with pytest.raises(ValueError, match=f"path: '{path}' cannot run this product"):
            multi.multi_lora_linear(b.x, b.weight, None, b.adapters, b.routing, path=path)


def test_multi_path_is_chosen_by_its_cost():
    """Few rows are decoded, many prefilled; with nothing added to a product there is one way."""

    def best(T, S, **how):
        p = Problem(T, 4096, 4096, 16, 2, slots=S, **how)
        paths = [path for path in MULTI_PATHS if choice.possible(path, p, 80, False)]
        return ledger.best(p, 80, tuple(paths))

    assert {best(T, S) for T in (1, 8, 32, 64) for S in (1, 8, 128)} == {"decode"}
    assert {best(T, S) for T in (2048, 8192) for S in (1, 8)} <= {"prefill", "library"}
    assert best(32, 8, weight=False) == "added"
    # A dependent launch waits for the one before it, which without ranks is a stranger's.
    for R in (0, 4):
        p = Problem(32, 64, 64, R, 2, slots=4)
        assert not choice.possible("decode_beside", p, 80, False)
        assert not choice.possible("library", p._replace(weight=False), 90, False)
    if not numerics.INTERPRETED.value:
        assert not choice.possible("decode_beside", p._replace(R=0), 90, False)
        assert not choice.possible("overlapped", Problem(32, 64, 64, 0, 2), 90, False)
    assert tuple(multi_product._RUN) == MULTI_PATHS


# Rows so far apart that offsets pass 2**31 elements; memory that is not touched costs nothing.
FAR = """
import torch
from fastlora.backends.triton import multi
from fastlora.backends.values import Adapters, Rows
def far(*shape):
    rows = shape[-2] * (shape[0] if len(shape) == 3 else 1)
    step = (2**31 + 64) // (rows - 1)
    t = torch.empty((rows - 1) * step + shape[-1], dtype=torch.float16)
    strides = (step, 1) if len(shape) == 2 else (shape[1] * step, step, 1)
    return t.as_strided(shape, strides).copy_(torch.randn(shape) / 4)
x, weight, A, B, y = far(5, 24), far(6, 24), far(2, 3, 24), far(2, 6, 3), far(5, 6)
ids = torch.tensor([1, -1, 0, 1, 0], dtype=torch.int32)
order, starts = torch.argsort(ids, stable=True), torch.tensor([1, 3, 5])
adapters = Adapters(A, B)
rows = Rows(ids, order, starts, torch.tensor([0.5, -1.0]), None, None)
delta = torch.stack([
    s * x[t].float() @ A[i].float().T @ B[i].float().T if i >= 0 else torch.zeros(6)
    for t, (i, s) in enumerate(zip(ids.tolist(), (-1.0, 0, 0.5, -1.0, 0.5)))
])
near = lambda a, b: torch.testing.assert_close(a.float(), b, rtol=1e-2, atol=1e-2)
for path in ("decode", "prefill", "library"):
    got, h = multi.multi_lora_linear(x, weight, None, adapters, rows, path=path)
    near(got, x.float() @ weight.float().T + delta)
    dx, dA, dB = multi.multi_lora_linear_backward(
        y, x, weight, adapters, h, rows, [1, 0, 0, 1, 1], path
    )
    mine = ids == 0
    near(dA[0], 0.5 * (y[mine].float() @ B[0].float()).T @ x[mine].float())
    near(dB[0], 0.5 * y[mine].float().T @ h[mine].float())
want = y.float() + delta
multi.multi_lora_add_(y, h, x, adapters, rows)
near(y, want)
print("right")
"""


def test_multi_kernels_reach_offsets_past_two_to_31():
    """In a process of its own: a wrong address may end it."""
    result = forks.run(FAR, env=dict(os.environ))
    assert result.stdout == "right\n", result.stderr[-2000:]
