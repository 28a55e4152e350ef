"""Under batch_invariant a row has the same bits alone and in any batch."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import fastlora
from fastlora import FastLoRALinear
from fastlora import functional as F
from fastlora.modules.served import MultiLoRALinear
from fastlora.ops import availability, dispatch, invariance
from tests.support.helpers import same_bits, signed

CPU = torch.device("cpu")
M, K, N, R, S = 70, 65, 33, 5, 4
# The interpreter computes bfloat16 in float32, whatever the kernel says.
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def batches(rows: int, count: int):
    """The rows of batches of every kind: some alone, all, and random ones in any order."""
    alone = max(3, min(count, 10))
    yield from (torch.tensor([row]) for row in range(0, rows, -(-rows // alone)))
    yield torch.arange(rows)
    for _ in range(count):
        yield torch.randperm(rows)[: int(torch.randint(1, rows + 1, ()))]


def operands(dtype, device=CPU, lora_dtype=None):
    how, lora = {"dtype": dtype, "device": device}, {"dtype": lora_dtype or dtype, "device": device}
    return (
        signed(M, K, **how),
        signed(N, K, **how, size=K**-0.5),
        signed(R, K, **lora, size=K**-0.5),
        signed(N, R, **lora),
    )


@pytest.mark.parametrize("lora_bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_lora_linear_row_keeps_bits_in_any_batch(dtype, lora_bias, backend, device):
    x, weight, A, B = operands(dtype, device, torch.float32)
    biases = {"bias": signed(N, dtype=dtype, device=device)}
    biases |= {"lora_bias": signed(N, dtype=A.dtype, device=device)} if lora_bias else {}

    def call(rows):
        return F.lora_linear(x[rows], weight, A, B, 0.5, **biases)

    def add(rows):
        return F.lora_add_(y[rows], x[rows], A, B, 0.5)

    count = 3 if backend == "triton" else 50
    y = signed(M, N, dtype=dtype, device=device)
    with fastlora.batch_invariant():
        whole, added = call(torch.arange(M)), add(torch.arange(M))
        for rows in batches(M, count):
            assert same_bits(call(rows), whole[rows])
            assert same_bits(add(rows), added[rows])
    torch.testing.assert_close(whole, call(torch.arange(M)), rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_multi_lora_row_keeps_bits_in_any_batch(dtype, backend):
    x, weight, _, _ = operands(dtype)
    A = signed(S, R, K, dtype=dtype, device=CPU, size=K**-0.5)
    B = signed(S, N, R, dtype=dtype, device=CPU)
    ids, ranks = torch.randint(-1, S, (M,)), torch.tensor([5, 0, 3, 1])
    scalings, scales = torch.rand(S) + 0.5, torch.rand(M)
    A[:, 3:][ranks <= 3] = float("nan")
    y = signed(M, N, dtype=dtype, device=CPU)

    def call(rows):
        how = {"ranks": ranks, "row_scales": scales[rows]}
        return F.multi_lora_linear(x[rows], weight, A, B, ids[rows], scalings, **how)

    def add(rows):
        how = {"ranks": ranks, "row_scales": scales[rows]}
        return F.multi_lora_add_(y[rows], x[rows], A, B, ids[rows], scalings, **how)

    every = torch.arange(M)
    with fastlora.batch_invariant():
        whole, added = call(every), add(every)
        for rows in batches(M, 1 if backend == "triton" else 50):
            assert same_bits(call(rows), whole[rows])
            assert same_bits(add(rows), added[rows])
        without = ids < 0
        assert without.any()
        base = F.base_linear(x, weight, None)
        # On Triton another kernel has the base alone, whose sums may be in another order.
        assert backend == "triton" or same_bits(whole[without], base[without])
        torch.testing.assert_close(whole[without], base[without], rtol=3e-2, atol=3e-2)
    torch.testing.assert_close(whole, call(every), rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_invariance_holds_for_unusual_output_strides(dtype, whole_backend):
    """Columns one behind the other; one column, on which a sum's vectors would end anywhere."""
    x, _, A, B = operands(dtype)
    scalings, ids = torch.rand(S) + 0.5, torch.randint(-1, S, (M,))
    slots = torch.stack([A] * S), torch.stack([B] * S)
    y = signed(N, M, dtype=dtype, device=CPU)
    one = signed(1, K, dtype=dtype, device=CPU), signed(1, R, dtype=dtype, device=CPU)
    bias = signed(1, dtype=dtype, device=CPU)

    def calls(rows):
        by_columns = [y[:, rows].contiguous().T for _ in range(2)]
        yield F.lora_add_(by_columns[0], x[rows], A, B, 0.7)
        yield F.multi_lora_add_(by_columns[1], x[rows], *slots, ids[rows], scalings)
        yield F.lora_linear(x[rows], one[0], A, one[1], 0.7, lora_bias=bias)

    with fastlora.batch_invariant():
        whole = list(calls(torch.arange(M)))
        for rows in batches(M, 10):
            for got, want in zip(calls(rows), whole, strict=True):
                assert same_bits(got.contiguous(), want[rows].contiguous())


def test_rows_without_adapter_are_invariant_in_training(backend):
    model = nn.Sequential(nn.Linear(K, N))
    config = fastlora.LoRAConfig(target_modules=["0"])
    fastlora.replace_linear(model, config, adapter_names=["a", "b"])
    x = torch.randn(3, K)
    with torch.no_grad(), fastlora.batch_invariant():
        with fastlora.use_adapters(model, ["a", None, "b"]):
            mixed = model(x)
        with fastlora.use_adapters(model, [None]):
            assert same_bits(model(x[1:2]), mixed[1:2])


@pytest.mark.parametrize("rows", [1, 63, 129, 431])
def test_native_rows_are_invariant_in_large_batches(rows, instruction_set):
    """More than one group of rows to a weight's panel."""
    if availability.cannot("cpu", CPU) is not None:
        pytest.skip(str(availability.cannot("cpu", CPU)))
    weight, A, B = (
        signed(67, 72, dtype=torch.float32, device=CPU),
        torch.randn(3, 72),
        torch.randn(67, 3),
    )
    x = torch.randn(rows, 72)
    with fastlora.use_backend("cpu"), fastlora.batch_invariant():
        whole = F.lora_linear(x, weight, A, B, 0.5)
        for row in range(0, rows, 17):
            assert same_bits(
                F.lora_linear(x[row : row + 1], weight, A, B, 0.5), whole[row : row + 1]
            )
    wide = x.double() @ weight.double().T + 0.5 * x.double() @ A.double().T @ B.double().T
    assert (whole - wide).norm() < 1e-6 * wide.norm()


@pytest.mark.parametrize("K, N, R", [(0, 5, 2), (5, 0, 2), (5, 4, 0)])
def test_batch_invariant_accepts_empty_dimensions(K, N, R, whole_backend):
    x, weight = torch.randn(3, K), torch.randn(N, K)
    A, B = torch.randn(R, K), torch.randn(N, R)
    with fastlora.batch_invariant():
        y = F.lora_linear(x, weight, A, B, 0.5)
        none = F.lora_linear(x[:0], weight, A, B, 0.5)
    torch.testing.assert_close(y, x @ weight.T + 0.5 * x @ A.T @ B.T)
    assert none.shape == (0, N)


def test_invariance_holds_for_transposed_weight(whole_backend):
    x, weight, A, B = operands(torch.float32)
    weight = weight.T.contiguous().T
    with fastlora.batch_invariant():
        whole = F.lora_linear(x, weight, A, B, 0.5)
        for rows in batches(M, 10):
            assert same_bits(F.lora_linear(x[rows], weight, A, B, 0.5), whole[rows])


def test_dropout_depends_only_on_row_index(whole_backend):
    x, weight, A, B = operands(torch.float32)

    def call(rows):
        torch.manual_seed(3)
        how = {"dropout_p": 0.5, "training": True}
        return F.lora_linear(x[:rows], weight, A, B, 0.5, **how)

    with fastlora.batch_invariant():
        whole = call(M)
        for rows in (1, 2, 33):
            assert same_bits(call(rows), whole[:rows])
        assert not same_bits(whole, F.lora_linear(x, weight, A, B, 0.5))


def test_batch_invariant_leaves_gradients_as_they_are(whole_backend):
    x, weight, A, B = operands(torch.float32)
    leaves = [t.requires_grad_() for t in (x, A, B)]
    dy = torch.randn(M, N)
    usual = torch.autograd.grad(F.lora_linear(x, weight, A, B, 0.5), leaves, dy)
    with fastlora.batch_invariant():
        y = F.lora_linear(x, weight, A, B, 0.5)
    for got, want in zip(torch.autograd.grad(y, leaves, dy), usual, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("state", ["adapted", "disabled", "merged", "served"])
def test_layers_are_invariant_in_every_state(state):
    x = torch.randn(M, K)
    linear = nn.Linear(K, N)
    if state == "served":
        layer = MultiLoRALinear.from_linear(linear, S, R)
        for slot in range(S):
            layer.set_adapter(slot, torch.randn(R, K), torch.randn(N, R), 0.5)
    else:
        layer = FastLoRALinear.from_linear(linear, R, init_lora_weights=False)
        layer.adapter_disabled = state == "disabled"
    if state == "merged":
        layer.eval().merge()
    ids = torch.randint(-1, S, (M,))

    def call(rows):
        return layer(x[rows], ids[rows]) if state == "served" else layer(x[rows])

    with torch.no_grad(), fastlora.batch_invariant():
        whole = call(torch.arange(M))
        for rows in batches(M, 20):
            assert same_bits(call(rows), whole[rows])
    torch.testing.assert_close(whole, call(torch.arange(M)).detach())


def test_compiled_function_keeps_invariance_it_was_traced_with():
    x, weight, A, B = operands(torch.float32)
    compiled = torch.compile(
        lambda rows: F.lora_linear(rows, weight, A, B, 0.5), fullgraph=True, backend="aot_eager"
    )
    eager = F.lora_linear(x, weight, A, B, 0.5)
    torch.testing.assert_close(compiled(x), eager)
    with fastlora.batch_invariant():
        whole = compiled(x)
        assert same_bits(whole, F.lora_linear(x, weight, A, B, 0.5))
        for rows in (torch.tensor([5]), torch.arange(9)):
            assert same_bits(compiled(x[rows]), whole[rows])
    torch.testing.assert_close(compiled(x), eager)


def test_batch_invariant_affects_its_thread_only():
    found = []
    with fastlora.batch_invariant(), fastlora.batch_invariant():
        assert invariance.asked()
        thread = threading.Thread(target=lambda: found.append(invariance.asked()))
        thread.start()
        thread.join()
        # A compiler, which sees no thread's own, is told of any.
        assert invariance._anywhere
    assert not invariance._anywhere
    assert found == [False]
    assert not invariance.asked()
    with pytest.raises(KeyError), fastlora.batch_invariant():
        raise KeyError


def test_batch_invariant_is_passed_to_backend(monkeypatch):
    told = []

    def recorded(*args, invariant=False):
        told.append(invariant)
        return args[0].new_zeros(M, N), args[0].new_zeros(M, R)

    monkeypatch.setattr(dispatch, "package", lambda _: SimpleNamespace(lora_linear=recorded))
    x, weight, A, B = operands(torch.float32)
    F.lora_linear(x, weight, A, B, 0.5)
    with fastlora.batch_invariant():
        F.lora_linear(x, weight, A, B, 0.5)
        F.lora_linear(x, weight, A.requires_grad_(), B, 0.5)
    assert told == [False, True, True]


def test_triton_path_and_tiles_ignore_row_count(monkeypatch):
    pytest.importorskip("triton")
    from fastlora.backends.triton import linear as lora
    from fastlora.backends.triton import product

    def recorded(path):
        return lambda p: ran.append((path, *(p.config(k) for k in ("shrink", "gemm", "expand"))))

    monkeypatch.setattr(product, "_RUN", {path: recorded(path) for path in product._RUN})
    for invariant, several in ((True, False), (False, True)):
        ran = []
        for rows in (1, 100, 8192):
            x, weight = torch.empty(rows, 64), torch.empty(4096, 64)
            factors = (torch.empty(4, 64), torch.empty(4096, 4), None, 0.5, 0.0, None)
            lora.lora_linear(x, weight, None, *factors, invariant=invariant)
        assert (len(set(ran)) > 1) == several
        # Not the library's, whatever a table of timings says.
        assert several or ran[0][0] == "two_pass"
