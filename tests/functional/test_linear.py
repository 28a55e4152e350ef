"""lora_linear and lora_add_: values, gradients, memory, and rows that stay apart."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as nnf

from fastlora import functional as F
from fastlora.backends.torch import wide_products as products
from fastlora.ops import dispatch
from tests.support import oracle
from tests.support.helpers import (
    DTYPES,
    LAYOUTS,
    Spy,
    as_rows,
    assert_accurate,
    leaves,
    lora_linear,
    same_bits,
    signed,
    unchanged,
)

# x's leading dimensions, N, K, R: odd sizes, one large at a time since the oracle is a slow loop.
CASES = [
    ((), 63, 31, 4),
    ((1,), 5, 7, 1),
    ((63,), 65, 33, 8),
    ((2, 5), 431, 17, 16),
    ((2, 3, 2), 7, 12, 2),
    ((7,), 2049, 9, 3),
    ((7,), 12, 1128, 16),
    ((1128,), 6, 10, 2),
    ((3,), 9, 11, 63),
    ((3,), 5, 7, 0),
    ((0,), 5, 7, 3),
    ((2, 0), 5, 7, 3),
    ((3,), 0, 7, 2),
]
SCALING = -0.75
NAMES = ("x", "weight", "bias", "lora_A", "lora_B", "lora_bias")

dtypes = pytest.mark.parametrize("dtype, lora_dtype", DTYPES.values(), ids=DTYPES)


def operands(lead, N, K, R, dtype, lora_dtype, device) -> dict[str, Tensor]:
    """All six tensors, the LoRA part about as large as the base product."""
    base, lora = {"dtype": dtype, "device": device}, {"dtype": lora_dtype, "device": device}
    return {
        "x": signed(*lead, K, **base),
        "weight": signed(N, K, **base),
        "bias": signed(N, **base),
        "lora_A": signed(R, K, **lora),
        "lora_B": signed(N, R, **lora, size=1 / math.sqrt(max(R, 1))),
        "lora_bias": signed(N, **lora),
    }


def call_linear(f, t: dict[str, Tensor], **options) -> Tensor:
    optional = {"bias": t.get("bias"), "lora_bias": t.get("lora_bias")}
    return f(t["x"], t["weight"], t["lora_A"], t["lora_B"], SCALING, **optional, **options)


def call_add(f, t: dict[str, Tensor], **options) -> Tensor:
    """The base product is another's, ``lora_add_`` comes after."""
    if f is lora_linear:
        return call_linear(f, {**t, "lora_bias": None}, **options)
    y = nnf.linear(t["x"], t["weight"], t["bias"])
    return F.lora_add_(y, t["x"], t["lora_A"], t["lora_B"], SCALING, **options)


def assert_matches_oracle(through, f, t: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Output and every gradient of ``through(f, …)`` against the oracle and unfused torch."""
    lora_bias = t["lora_bias"] if through is call_linear else None
    args = (as_rows(t["x"]), t["weight"], t["lora_A"], t["lora_B"], SCALING)
    want = oracle.lora_linear(*args, bias=t["bias"], lora_bias=lora_bias)
    ours, plain = leaves(t), leaves(t)
    y, unfused = through(f, ours), through(lora_linear, plain)
    assert y.dtype == dtype
    assert_accurate(y, want.view(unfused.shape), unfused, dtype)

    dy = signed(*y.shape, dtype=dtype, device=y.device)
    y.backward(dy)
    unfused.backward(dy)
    grads = oracle.lora_linear_grads(as_rows(dy), *args)
    for name in NAMES if through is call_linear else NAMES[:-1]:
        got, expected = ours[name].grad, grads[name].view(ours[name].shape)
        assert got.dtype == ours[name].dtype
        assert_accurate(got, expected, plain[name].grad, dtype)


@dtypes
@pytest.mark.parametrize("through", [call_linear, call_add])
@pytest.mark.parametrize("lead, N, K, R", CASES)
def test_lora_linear_matches_oracle_with_gradients(
    lead, N, K, R, through, dtype, lora_dtype, device, backend
):
    t = operands(lead, N, K, R, dtype, lora_dtype, device)
    assert_matches_oracle(through, F.lora_linear, t, dtype)


@pytest.mark.parametrize("K, N, name", [(40, 1, "lora_A"), (1, 40, "lora_B")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_float32_adapter_gradients_are_not_rounded_to_base(K, N, name, dtype, device, backend):
    """Unfused torch does round them: the oracle's bound would let it pass."""
    t = operands((63,), N, K, 1, dtype, torch.float32, device)
    # So that neither h nor dy @ lora_B is rounded, and what is left is one sum of exact products.
    t["lora_A" if name == "lora_B" else "lora_B"] = torch.ones(1, 1, device=device)
    t, dy = leaves(t), signed(63, N, dtype=dtype, device=device)
    call_linear(F.lora_linear, t).backward(dy)
    want = SCALING * (t["x"].double().T @ dy.double())
    got = t[name].grad.double()
    assert (got.T - want).norm() <= 1e-5 * want.norm()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("through", [call_linear, call_add])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora_linear_accepts_any_strides_and_alignment(layout, through, dtype, device, backend):
    plain = operands((3, 9), 31, 37, 5, dtype, torch.float32, device)
    t = {name: layout(tensor) for name, tensor in plain.items()}
    with unchanged(t):
        assert_matches_oracle(through, F.lora_linear, t, dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_lora_add_writes_y_of_any_layout(layout, device, backend):
    t = operands((3, 4), 31, 17, 5, torch.float32, torch.float32, device)
    y = layout(signed(3, 4, 31, dtype=torch.float32, device=device))
    address = y.data_ptr()
    delta = oracle.lora_linear(t["x"].view(-1, 17), None, t["lora_A"], t["lora_B"], SCALING)
    want = y.double().cpu() + delta.view(y.shape)
    assert F.lora_add_(y, t["x"], t["lora_A"], t["lora_B"], SCALING) is y
    assert y.data_ptr() == address
    assert oracle.relative_error(y, want) < 1e-6


def test_lora_add_ignores_what_h_held_before(device, backend):
    """What a scratch tensor holds before the op, NaN here, is nobody's business."""
    t = operands((6,), 9, 7, 3, torch.float32, torch.float32, device)
    y, h = signed(6, 9, dtype=torch.float32, device=device), torch.full((6, 3), torch.nan)
    want = F.lora_add_(y.clone(), t["x"], t["lora_A"], t["lora_B"], SCALING)
    last = (SCALING, 0.0, None, False, backend)
    h = h.to(device)
    torch.ops.fastlora.lora_add_(y, h, t["x"], t["lora_A"], t["lora_B"], None, *last)
    assert same_bits(y, want)
    torch.testing.assert_close(h, t["x"] @ t["lora_A"].T)


# GEMMs that each gradient costs alone, and lora_A and lora_B together.
@pytest.mark.parametrize(
    "needed, gemms",
    [
        (("x",), 3),
        (("weight",), 1),
        (("bias",), 0),
        (("lora_A",), 2),
        (("lora_B",), 1),
        (("lora_bias",), 0),
        (("lora_A", "lora_B"), 3),
        (("x", "lora_A"), 4),
    ],
)
def test_backward_computes_only_gradients_asked_for(needed, gemms, whole_backend, monkeypatch):
    given = []
    real = dispatch.implementation("lora_linear_backward", whole_backend)
    monkeypatch.setattr(
        dispatch._loaded[whole_backend],
        "lora_linear_backward",
        lambda *a: given.append(real(*a)) or given[-1],
    )
    plain = operands((6,), 9, 7, 3, torch.float32, torch.float32, torch.device("cpu"))
    whole, part = leaves(plain), leaves(plain, *needed)
    call_linear(F.lora_linear, whole).square().sum().backward()
    y = call_linear(F.lora_linear, part)
    dy = 2 * y.detach()
    with Spy() as spy:
        y.backward(dy)
    assert [len(grads) for grads in given] == [6, len(needed)]
    assert spy.gemms == gemms or whole_backend != "torch"
    for name in NAMES:
        assert (part[name].grad is None) == (name not in needed)
        assert part[name].grad is None or same_bits(part[name].grad, whole[name].grad)


def test_lora_linear_builds_no_graph_without_gradients():
    t = operands((6,), 9, 7, 3, torch.float32, torch.float32, torch.device("cpu"))
    assert call_linear(F.lora_linear, t).grad_fn is None
    with torch.no_grad():
        assert call_linear(F.lora_linear, leaves(t)).grad_fn is None


def test_backward_twice_leaves_saved_tensors_unchanged(device, backend):
    t = leaves(operands((6,), 9, 7, 3, torch.float32, torch.float32, device))
    for through in (call_linear, call_add):
        y = through(F.lora_linear, t, dropout_p=0.5, training=True)
        dy = torch.ones_like(y)
        wanted = [t[n] for n in ("x", "lora_A", "lora_B")]
        with unchanged(t, dy, y):
            first = torch.autograd.grad(y, wanted, dy, retain_graph=True)
            second = torch.autograd.grad(y, wanted, dy)
        assert all(same_bits(a, b) for a, b in zip(first, second, strict=True))


@dtypes
def test_lora_linear_repeats_bits_for_same_input(dtype, lora_dtype, device, backend):
    plain = operands((63,), 65, 33, 8, dtype, lora_dtype, device)
    results = []
    for _ in range(2):
        t = leaves(plain)
        y = call_linear(F.lora_linear, t)
        y.backward(y.detach())
        results.append([y, *(t[n].grad for n in NAMES)])
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_row_with_nan_leaves_other_rows_alone(poison, device, backend):
    clean = operands((9,), 31, 17, 5, torch.float32, torch.float32, device)
    dirty = {**clean, "x": clean["x"].clone()}
    dirty["x"][4] = poison
    others = torch.arange(9, device=device) != 4
    results = []
    for plain in (clean, dirty):
        t = leaves(plain, "x")
        y = call_linear(F.lora_linear, t, dropout_p=0.0)
        y.sum().backward()
        results.append((y[others], t["x"].grad[others]))
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("whole_backend", ["torch"], indirect=True)
def test_lora_linear_allocates_little_beyond_result(training, whole_backend):
    """One M*N tensor, the result; nothing N*K; no float32 copy of x beyond a block."""
    M, N, K, R = 1100, 256, 320, 4
    t = leaves(operands((M,), N, K, R, torch.bfloat16, torch.float32, torch.device("cpu")))
    frozen = {**t, "weight": t["weight"].detach(), "bias": t["bias"].detach()}
    with Spy() as spy:
        y = call_linear(F.lora_linear, frozen, dropout_p=0.25, training=training)
    block = products._CPU_BLOCK + 8 * M if training else M * R
    assert M * K > products._CPU_BLOCK > N * K
    assert spy.sizes()[0] == M * N if not training else spy.sizes(torch.bfloat16).count(M * N) == 1
    assert max(s for s in spy.sizes() if s != M * N) <= block
    dy = torch.ones_like(y)
    with Spy() as spy:
        y.backward(dy)
    assert spy.sizes(torch.bfloat16)[0] == M * K  # dx
    assert N * K not in spy.sizes()
    assert max(spy.sizes(torch.float32)) <= products._CPU_BLOCK


def test_lora_linear_of_rank_0_equals_base(device, whole_backend):
    t = operands((6,), 9, 7, 0, torch.float32, torch.float32, device)
    base = nnf.linear(t["x"], t["weight"], t["bias"])
    assert same_bits(call_linear(F.lora_linear, {**t, "lora_bias": None}), base)
