"""Products of plain torch depend neither on memory between an operand's rows nor on other rows."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as nnf

import fastlora
from fastlora import functional as F
from fastlora.backends.torch import products as library
from fastlora.ops import availability
from tests.support.adapters_in_batches import Batch, Paged
from tests.support.helpers import misaligned, same_bits, signed, sliced, strided, transposed
from tests.support.reading_past import ReadsPastRows, columns_read
from tests.thinning import skip_where

BF16, F32 = torch.bfloat16, torch.float32
CPU = torch.device("cpu")
# More rows than go through a kernel of ours, and columns that end within a step.
T, K, N, R, S = 70, 37, 35, 5, 3
INTERPRETED = 19  # rows, where each takes long
WIDTHS, PAGE = (21, 14), 2


@pytest.fixture
def reading(monkeypatch):
    """What this machine's torch does, and what AMX would make of it besides."""
    monkeypatch.setattr(library, "reads_past_rows", library.reads_past_rows.__wrapped__)
    with ReadsPastRows():
        yield


@skip_where
def cannot(backend: str) -> str | None:
    return availability.cannot(backend, CPU, BF16)


@skip_where
def in_one_dtype(backend: str, lora_dtype: torch.dtype) -> str | None:
    skips = backend == "triton" and lora_dtype == BF16
    return "interpreted in one dtype: the kernels' own tests read any layout" if skips else None


def draw_operands(lora_dtype, T=T) -> dict[str, Tensor]:
    b = Batch.draw(T, K, N, R, S, BF16, lora_dtype, CPU)
    A, B = b.A.nan_to_num(), b.B.nan_to_num()
    whole = Paged.of(torch.cat([A, -A], 1), B, torch.full((S,), R), PAGE, len(WIDTHS))
    return {
        "x": b.x, "weight": b.weight, "bias": b.bias, "lora_A": A, "lora_B": B,
        "y": signed(T, N, dtype=BF16, device=CPU), "dy": signed(T, N, dtype=BF16, device=CPU),
        "packed A": torch.cat([A, -A], 1),
        "pages A": whole.A.nan_to_num(), "pages B": whole.B.nan_to_num(), "table": whole.table,
        "ids": torch.arange(T) % (S + 1) - 1, "scalings": torch.ones(S),
    }  # fmt: skip


def multi(t: dict) -> tuple[Tensor, ...]:
    return t["lora_A"], t["lora_B"], t["ids"], t["scalings"]


def in_pages(t: dict) -> tuple[Tensor, ...]:
    return t["pages A"], t["pages B"], t["ids"], t["scalings"]


def paged(t: dict) -> dict:
    return {"slices": WIDTHS, "page_table": t["table"]}


def one(t: dict) -> tuple:
    return t["lora_A"][1], t["lora_B"][1], 0.5


PACKED, RANKS = {"slices": WIDTHS}, torch.tensor([3, 5, 1])
# Every op as a call, and whether it is differentiable.
CALLS: dict[str, tuple[Callable[[dict], Tensor], bool]] = {
    "lora_linear": (lambda t: F.lora_linear(t["x"], t["weight"], *one(t), bias=t["bias"]), True),
    "lora_linear with dropout": (
        lambda t: F.lora_linear(t["x"], t["weight"], *one(t), dropout_p=0.5, training=True), True,
    ),
    "lora_add_": (lambda t: F.lora_add_(t["y"] + 0, t["x"], *one(t)), True),
    "lora_add_ onto a slice": (lambda t: F.lora_add_(sliced(t["y"]), t["x"], *one(t)), False),
    "lora_add_ onto columns": (lambda t: F.lora_add_(transposed(t["y"]), t["x"], *one(t)), False),
    "base_linear": (lambda t: F.base_linear(t["x"], t["weight"], t["bias"]), True),
    "multi_lora_linear": (
        lambda t: F.multi_lora_linear(t["x"], t["weight"], *multi(t), bias=t["bias"]), True,
    ),
    "multi_lora_linear of ranks": (
        lambda t: F.multi_lora_linear(t["x"], t["weight"], *multi(t), ranks=RANKS),
        True,
    ),
    "multi_lora_add_": (lambda t: F.multi_lora_add_(t["y"] + 0, t["x"], *multi(t)), True),
    "packed_lora_linear": (
        lambda t: F.multi_lora_linear(
            t["x"], t["weight"], t["packed A"], *multi(t)[1:], **PACKED
        ), True,
    ),
    "packed_lora_add_": (
        lambda t: F.multi_lora_add_(t["y"] + 0, t["x"], t["packed A"], *multi(t)[1:], **PACKED),
        True,
    ),
    "packed_lora_linear of pages": (
        lambda t: F.multi_lora_linear(t["x"], t["weight"], *in_pages(t), **paged(t)), False,
    ),
    "packed_lora_add_ of pages": (
        lambda t: F.multi_lora_add_(t["y"] + 0, t["x"], *in_pages(t), **paged(t)), False,
    ),
}  # fmt: skip
FACTORS = ("lora_A", "lora_B", "packed A", "pages A", "pages B")
NAMES = ("x", "weight", "lora_A", "lora_B", "packed A", "y")
OPERANDS = {"x": ("x",), "weight": ("weight",), "factors": FACTORS, "y": ("y",), "dy": ("dy",)}


def results(call: Callable[[dict], Tensor], differentiable: bool, t: dict) -> list[Tensor]:
    """The output, and the gradients of x and of whatever else the call takes."""
    if not differentiable:
        with torch.no_grad():
            return [call(t)]
    wanted = {n: v.detach().requires_grad_() for n, v in t.items() if n in NAMES}
    torch.manual_seed(0)
    y = call({**t, **wanted})
    y.backward(t["dy"])
    return [y.detach(), *(v.grad for v in wanted.values() if v.grad is not None)]


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("lora_dtype", [BF16, F32])
@pytest.mark.parametrize("backend", ["torch", "cpu", "triton"])
@in_one_dtype
@cannot
def test_results_ignore_memory_between_rows(backend, lora_dtype, name, reading):
    call, differentiable = CALLS[name]
    interpreted = backend == "triton"
    t = draw_operands(lora_dtype, INTERPRETED if interpreted else T)
    layouts = {what: {n: sliced(t[n]) for n in names} for what, names in OPERANDS.items()}
    everything = {n: v for given in layouts.values() for n, v in given.items()}
    if interpreted:
        layouts = {}
    with fastlora.use_backend(backend):
        want = results(call, differentiable, t)
        assert all(v.isfinite().all() for v in want)
        for what, given in {**layouts, "all": everything}.items():
            got = results(call, differentiable, {**t, **given})
            for g, w in zip(got, want, strict=True):
                assert g.isfinite().all(), f"{what}: NaN from between its rows"
                torch.testing.assert_close(g, w, rtol=2**-6, atol=2**-4)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("backend", ["torch", "cpu"])
@cannot
def test_row_of_nan_stays_alone(backend, name, reading):
    """In x and in y's gradient, dense ones: the row before it reads into it."""
    call, differentiable = CALLS[name]
    t = draw_operands(BF16)
    others = torch.arange(T) != 40
    with fastlora.use_backend(backend):
        for poisoned in ("x", "dy")[: 1 + differentiable]:
            bad = t[poisoned].clone()
            bad[40] = torch.nan
            y, *grads = results(call, differentiable, {**t, poisoned: bad})
            assert y[others].isfinite().all()
            assert poisoned == "x" or not grads or grads[0][others].isfinite().all()


def test_merged_and_disabled_layers_isolate_rows_too(reading):
    """Their base product is torch's own, and so is its gradient."""
    layer = fastlora.FastLoRALinear(K, N, r=R, dtype=BF16)
    x = sliced(signed(T, K, dtype=BF16, device=CPU))
    with fastlora.disable_adapter(layer):
        x = x.requires_grad_()
        layer(x).backward(sliced(signed(T, N, dtype=BF16, device=CPU)))
        assert x.grad.isfinite().all()
    layer.eval().merge()
    with torch.no_grad():
        assert layer(x).isfinite().all()
    with torch.autocast("cpu", BF16), torch.no_grad():
        wide = fastlora.FastLoRALinear(K, N, r=R).eval()
        wide.merge()
        assert wide(sliced(x.float())).isfinite().all()


@pytest.mark.parametrize("lay", [strided, transposed, misaligned, sliced])
@pytest.mark.parametrize("width", [1, 2, 31, 32, 33, 36, 64, 66, 100])
def test_isolate_rows_keeps_bits_and_adds_zeros(lay, width, monkeypatch):
    monkeypatch.setattr(library, "reads_past_rows", lambda dtype: True)
    t = lay(signed(19, width, dtype=BF16, device=CPU))
    rows = library.isolate_rows(t)
    assert same_bits(rows, t)
    end = columns_read(width)
    if rows is t:
        by_columns = width > 1 and t.stride(0) == 1
        assert end == width or by_columns
    else:
        behind = rows.as_strided((19, end - width), (rows.stride(0), 1), width)
        assert rows.stride(0) >= end
        assert not behind.any()


def test_isolate_rows_copies_nothing_at_full_steps(monkeypatch):
    monkeypatch.setattr(library, "reads_past_rows", lambda dtype: True)
    for width in (2, 8, 16, 32, 64, 96, 4096):
        for lay in (misaligned, sliced):
            t = lay(signed(3, width, dtype=BF16, device=CPU))
            assert library.isolate_rows(t) is t
    for t in (signed(1, 37, dtype=BF16, device=CPU), signed(3, 37, dtype=F32, device=CPU)):
        assert library.isolate_rows(t) is t


def test_isolate_rows_copies_nothing_on_safe_torch(monkeypatch):
    monkeypatch.setattr(library, "reads_past_rows", lambda dtype: False)
    t = sliced(signed(19, 37, dtype=BF16, device=CPU))
    assert library.isolate_rows(t) is t


def test_reads_past_rows_is_found_by_trying():
    with ReadsPastRows():
        assert library.reads_past_rows.__wrapped__(BF16)
        assert not library.reads_past_rows.__wrapped__(F32)


def test_emulation_spoils_same_elements_as_amx():
    """Of 17 rows: oneDNN divides K otherwise where they are many."""
    if not library.reads_past_rows(BF16):
        pytest.skip("this machine's torch does not read past rows")
    for width in range(9, 200):
        x = signed(17, width, dtype=BF16, device=CPU)
        x[::2] = torch.nan
        weight = signed(64, width, dtype=BF16, device=CPU)
        real = nnf.linear(x, weight)
        with ReadsPastRows():
            emulated = nnf.linear(x, weight)
        assert torch.equal(real.isnan().any(1), emulated.isnan().any(1)), width


def test_product_into_transposed_result_isolates_rows(reading):
    a, b = signed(19, 37, dtype=BF16, device=CPU), sliced(signed(33, 37, dtype=BF16, device=CPU))
    y = torch.zeros(33, 19, dtype=BF16).T
    assert library.addmm_(y, a, b.T).isfinite().all()
    assert library.mm(a, b.T, out=y).isfinite().all()
