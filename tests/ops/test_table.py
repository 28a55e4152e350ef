"""The raw ops, alone and under torch.compile and autocast."""

import operator

import pytest
import torch

from fastlora import functional as F
from fastlora.ops import availability, dispatch
from fastlora.ops.table import OPS
from tests.support.calls import (
    IDS,
    MULTI,
    RANKS,
    SCALING,
    SCALINGS,
    K,
    M,
    N,
    R,
    S,
    add,
    functions,
    last_arguments,
    linear,
    merge_calls,
    multi_linear,
    operands,
    rand,
    weight_and_adapter,
)
from tests.support.helpers import assert_near, same_bits

ops = torch.ops.fastlora


def raw_calls(backend: str = "torch") -> dict[str, tuple]:
    """Operands of every op, optional ones given and not; keys are "<op> <number>"."""
    x, weight, A, B = operands(linear)
    _, _, As, Bs = operands(multi_linear)
    y, h, dy, bias, seed = rand(M, N), rand(M, R), rand(M, N), rand(N), torch.tensor(7)
    groups = ops.group_rows(IDS, S, backend)
    some, every = (*groups, SCALINGS, None, None), (*groups, SCALINGS, RANKS, rand(M))
    # Pages of two ranks, for each of two slices.
    table = torch.tensor([[2, 0], [1, -1]], dtype=torch.int32)
    packed = (rand(3, 4, K), rand(3, N, 2), table)
    plain, dropped = (0.5, 0.0, None), (0.5, 0.25, seed)
    multi_needs = [True, False, False, True, False]
    return {
        "lora_linear 1": (x, weight, None, A, B, None, *plain),
        "lora_linear 2": (x, weight, bias, A, B, bias, *dropped),
        "lora_add_ 1": (y, h, x, A, B, None, *plain),
        "lora_add_ 2": (y, h, x, A, B, bias, *dropped),
        "lora_linear_backward 1": (dy, x, weight, A, B, h, *plain, [True] * 6),
        "lora_linear_backward 2": (dy, x, None, A, B, h, *dropped, [True, False, False] * 2),
        "group_rows 1": (IDS, S),
        "multi_lora_linear 1": (x, weight, None, As, Bs, *some),
        "multi_lora_linear 2": (x, weight, bias, As, Bs, *every),
        "multi_lora_add_ 1": (y, h, x, As, Bs, *some),
        "multi_lora_add_ 2": (y, h, x, As, Bs, *every),
        "multi_lora_linear_backward 1": (dy, x, weight, As, Bs, h, *some, [True] * 5),
        "multi_lora_linear_backward 2": (dy, x, None, As, Bs, h, *every, multi_needs),
        "packed_lora_linear 1": (x, weight, None, As, Bs, None, [N], *some),
        "packed_lora_linear 2": (x, weight, bias, *packed, [1, N], *every),
        "packed_lora_add_ 1": (y, x, As, Bs, None, [N], *some),
        "packed_lora_add_ 2": (y, x, *packed, [1, N], *every),
        **{
            f"{op} {i}": args
            for op, several in merge_calls("cpu", backend).items()
            for i, args in enumerate(several, 1)
        },
    }


@pytest.mark.parametrize("call", raw_calls())
def test_raw_op_passes_opcheck(call, whole_backend):
    op = call.split()[0]
    args = (*raw_calls(whole_backend)[call], *last_arguments(op, whole_backend))
    torch.library.opcheck(getattr(ops, op), args)


def test_every_op_has_a_raw_call():
    assert set(OPS) == {call.split()[0] for call in raw_calls()}


@pytest.mark.parametrize("backend", availability.BACKENDS)
def test_backend_has_exactly_the_ops_recorded(backend):
    if backend == "triton":
        pytest.importorskip("triton")
    functions = vars(dispatch.package(backend))
    assert {name for name in OPS if name in functions} == {
        name for name, op in OPS.items() if backend in op.backends
    }


@pytest.mark.parametrize("call", [call for call in raw_calls() if "_ " in call])
def test_in_place_ops_bump_tensor_versions(call, whole_backend):
    args = raw_calls(whole_backend)[call]
    one = "packed" in call
    written = args[0] if isinstance(args[0], list) else args[: 1 if one else 2]
    before = [t._version for t in written]
    op = call.split()[0]
    getattr(ops, op)(*args, *last_arguments(op, whole_backend))
    assert all(t._version > old for t, old in zip(written, before, strict=True))


@functions
def test_functions_of_meta_tensors_give_shapes(f):
    if f in MULTI:
        pytest.skip("its ids are on the host")
    assert f(*(t.to("meta") for t in operands(f))).shape == (M, N)


def compiled_and_eager(f, options: dict, sizes: tuple[int, ...]) -> None:
    """Fullgraph, forward and backward, at several batch sizes; eager's bits in all of them."""
    torch.compiler.reset()
    compiled = torch.compile(lambda *args: f(*args, **options), fullgraph=True)
    for rows in sizes:
        results = []
        args = operands(f, rows=rows)
        for run in (compiled, lambda *args: f(*args, **options)):
            leaves = [t.clone().requires_grad_() for t in args]
            torch.manual_seed(rows)
            y = run(*leaves)
            y.sin().sum().backward()
            results.append([y, *(t.grad for t in leaves)])
        for ours, eager in zip(*results, strict=True):
            assert_near(ours, eager)


@functions
def test_compiled_function_equals_eager(f):
    compiled_and_eager(f, {}, (4, 6, 9))


@pytest.mark.parametrize("f", [linear, add])
def test_compiled_dropout_equals_eager_with_fallback_seeds(f):
    """Eager's seeds on request: then eager's masks, in forward and backward."""
    with torch._inductor.config.patch(fallback_random=True):
        compiled_and_eager(f, {"dropout_p": 0.4, "training": True}, (4, 6))


def test_compiled_dropout_has_one_mask_per_call():
    """With Inductor's generator too backward has its forward's mask, and every call its own."""
    torch.compiler.reset()
    A, B, weight = torch.eye(K), torch.eye(K), torch.zeros(K, K)

    @torch.compile(fullgraph=True)
    def dropped(x):
        return F.lora_linear(x, weight, A, B, 1.0, dropout_p=0.5, training=True)

    masks = []
    for _ in range(3):
        x = torch.ones(64, K, requires_grad=True)
        y = dropped(x)
        y.sum().backward()
        assert torch.equal(x.grad, y)
        masks.append(y.detach())
    assert set(masks[0].unique().tolist()) == {0.0, 2.0}
    assert not torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[1], masks[2])


def test_compiled_function_follows_changing_scaling():
    torch.compiler.reset()
    x, weight, A, B = operands(linear)
    compiled = torch.compile(lambda x, s: F.lora_linear(x, weight, A, B, s), fullgraph=True)
    for scaling in (0.5, 0.75, -1.25):
        assert_near(compiled(x, scaling), F.lora_linear(x, weight, A, B, scaling))


def test_compiled_in_place_ops_write_their_argument():
    torch.compiler.reset()
    x, weight, A, B = operands(add)
    As, Bs = operands(multi_linear)[2:]

    @torch.compile(fullgraph=True)
    def run(y, x, groups):
        F.lora_add_(y, x, A, B, SCALING)
        return F.multi_lora_add_(y, x, As, Bs, groups, SCALINGS)

    groups = F.group_rows(IDS, S)
    y = x @ weight.T
    want = F.multi_lora_add_(F.lora_add_(y.clone(), x, A, B, SCALING), x, As, Bs, IDS, SCALINGS)
    got = run(y, x, groups)
    assert_near(y, want)
    assert_near(got, want)


def test_compiled_function_runs_merging_eagerly():
    """A receipt's size breaks the graph; what runs then is the op's own arithmetic, bit for bit."""
    torch.compiler.reset()
    weight, adapter = weight_and_adapter(300, 431, 16, torch.float32)
    before, eager = weight.clone(), weight.clone()
    F.merge_(eager, [adapter])
    traced = []

    def backend(graph, _inputs):
        traced.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph

    receipt = torch.compile(lambda w: F.merge_(w, [adapter]), backend=backend)(weight)
    assert same_bits(weight, eager)
    torch.compile(F.unmerge_, backend=backend)(weight, receipt)
    assert same_bits(weight, before)
    assert not {torch.matmul, operator.matmul, torch.mul, operator.mul} & set(traced)


@functions
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_equals_casting_by_hand(f, dtype):
    """As casting by hand: products in bfloat16, gradients in the dtype of what they belong to."""
    x, weight, A, B = operands(f)
    given = [x.to(dtype), weight, A, B]
    by_hand = [given[0].bfloat16(), weight.bfloat16(), A, B]
    ours, want = ([t.detach().clone().requires_grad_() for t in ts] for ts in (given, by_hand))
    with torch.autocast("cpu", torch.bfloat16):
        y = f(*ours)
    hand = f(*want)
    assert y.dtype == torch.bfloat16
    assert same_bits(y, hand)
    y.sum().backward()
    hand.sum().backward()
    for t, w in zip(ours, want, strict=True):
        assert t.grad.dtype == t.dtype
        # An x that two ops cast has its two gradients summed before or after rounding.
        torch.testing.assert_close(t.grad, w.grad.to(t.dtype), rtol=2**-6, atol=2**-6)


def test_autocast_add_keeps_float32_y():
    """y's dtype is the base layer's choice: x follows it, and the products are taken in it."""
    x, _, A, B = operands(multi_linear)
    y = rand(M, N)
    want = F.multi_lora_add_(y.clone(), x, A, B, IDS, SCALINGS)
    want = F.lora_add_(want, x, A[0], B[0], SCALING)
    with torch.autocast("cpu", torch.bfloat16):
        F.multi_lora_add_(y, x, A, B, IDS, SCALINGS)
        F.lora_add_(y, x, A[0], B[0], SCALING)
    assert same_bits(y, want)


def test_autocast_leaves_float64_and_merging_alone():
    args = operands(linear, torch.float64)
    want, merged = linear(*args), args[1].clone()
    F.merge_(merged, [(*args[2:], SCALING)])
    with torch.autocast("cpu", torch.bfloat16):
        assert same_bits(linear(*args), want)
        F.merge_(args[1], [(*args[2:], SCALING)])
    assert same_bits(args[1], merged)
