"""The Triton kernels for one adapter at their limits: refusals, overflow, huge offsets."""

import os

import pytest
import torch

from tests.support import forks, oracle
from tests.support.helpers import (
    Spy,
    operands,
    same_bits,
    signed,
)

pytest.importorskip("triton", reason="triton is not installed")
from fastlora.backends.triton import linear as lora
from fastlora.backends.triton import product
from fastlora.kernels.choose.ledger import PATHS
from fastlora.kernels.tile import configs, numerics

pytestmark = pytest.mark.usefixtures("triton_usable", "memory_holds_nan")


SCALING, P, SEED = -0.75, 0.4, 0x1234_5678_9ABC_DEF1


def test_lora_linear_refuses_path_that_cannot_run(device):
    x, weight, _, A, B, _ = operands(3, 8, 8, 200, *[torch.float32] * 2, device)
    with pytest.raises(ValueError, match="path: 'one_pass' cannot run this product"):
        lora.lora_linear(x, weight, None, A, B, None, SCALING, 0.0, None, "one_pass")


def test_backward_runs_only_kernels_it_needs(device, monkeypatch):
    ran: list[str] = []
    spied = ((product, "shrink"), (lora, "shrink"), (product, "one_pass"), (lora, "gradient"))
    for module, name in spied:
        real = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *a, _n=name, _r=real, **k: (ran.append(_n), _r(*a, **k))[1]
        )
    x, weight, _, A, B, _ = operands(5, 9, 7, 3, *[torch.float32] * 2, device)
    dy, h = signed(5, 7, dtype=x.dtype, device=device), x @ A.T
    for wanted, kernels in (
        ("x", ["one_pass"]),
        ("A", ["shrink", "gradient"]),
        ("B", ["gradient"]),
        ("xAB", ["one_pass", "gradient", "gradient"]),
        ("", []),
    ):
        needs = [letter in wanted for letter in "xwbABl"]
        every = [letter in "xAB" for letter in "xwbABl"]
        grads = lora.lora_linear_backward(dy, x, weight, A, B, h, SCALING, 0.0, None, needs)
        assert (len(grads), ran) == (len(wanted), kernels)
        whole = lora.lora_linear_backward(dy, x, weight, A, B, h, SCALING, 0.0, None, every)
        same = dict(zip("xAB", whole, strict=True))
        assert all(same_bits(g, same[n]) for g, n in zip(grads, wanted, strict=True))
        ran.clear()


def test_gradient_sums_in_parts_with_repeatable_bits(device, monkeypatch):
    """Enough rows for several programs a column: their sums are added in order, as in one."""
    x, h = (signed(700, n, dtype=torch.bfloat16, device=device) for n in (40, 16))
    results = []
    for programs in (256, 1):
        monkeypatch.setattr("fastlora.kernels.linear.gradient.PROGRAMS", programs)
        for _ in range(2):
            out = torch.empty(16, 40, dtype=torch.float32, device=device)
            lora.gradient(x, h, out, SCALING, configs.Gradient(32, 16, 4, 2))
            results.append(out)
    want = SCALING * h.double().T @ x.double()
    assert same_bits(results[0], results[1])
    assert not same_bits(results[0], results[2])
    for out in results:
        assert oracle.relative_error(out, want) < 1e-5


def test_large_scaling_does_not_overflow_float16(device):
    """h fits float16, scaling * h does not, y does: the factor meets the float32 sum alone."""
    x = torch.full((4, 16), 60.0, dtype=torch.float16, device=device)
    weight = torch.zeros(8, 16, dtype=torch.float16, device=device)
    A, B = torch.full_like(x[:2], 30.0), torch.full_like(x[:1, :2], 1e-4).expand(8, 2)
    for path in ("one_pass", "two_pass", "library"):
        y, h = lora.lora_linear(x, weight, None, A, B, None, 64.0, 0.0, None, path)
        want = 64.0 * x.double() @ A.double().T @ B.double().T
        assert h.max() * 64 > torch.finfo(torch.float16).max
        assert oracle.relative_error(y, want) < 1e-3


def test_adapters_of_wider_dtype_are_not_copied(device):
    """Nothing of an adapter's size is allocated in x's dtype, on any path."""
    x, weight, _, A, B, _ = operands(40, 136, 152, 24, torch.bfloat16, torch.float32, device)
    with Spy() as spy:
        for path in ("one_pass", "two_pass", "library"):
            y, h = lora.lora_linear(x, weight, None, A, B, None, SCALING, 0.0, None, path)
            needs = [True, False, False, True, True, False]
            lora.lora_linear_backward(y, x, weight, A, B, h, SCALING, 0.0, None, needs, path)
    sizes = set(spy.sizes(torch.bfloat16))
    assert y.numel() in sizes
    assert not {A.numel(), B.numel()} & sizes


def test_interpreted_bfloat16_is_wrong_without_guard(device):
    """So ``numerics.dot`` and ``numerics.narrow`` matter: the same sums without them are off."""
    import triton
    import triton.language as tl

    if not numerics.INTERPRETED.value:
        pytest.skip("a GPU has bfloat16")

    @triton.jit
    def guarded(p_a, p_b, p_out, n: tl.constexpr):
        index = tl.arange(0, n)[:, None] * n + tl.arange(0, n)[None, :]
        acc = tl.zeros([n, n], tl.float32)
        acc = numerics.dot(tl.load(p_a + index), tl.load(p_b + index), acc, "ieee")
        tl.store(p_out + index, numerics.narrow(acc, tl.bfloat16))

    @triton.jit
    def bare(p_a, p_b, p_out, n: tl.constexpr):
        index = tl.arange(0, n)[:, None] * n + tl.arange(0, n)[None, :]
        acc = tl.dot(tl.load(p_a + index), tl.load(p_b + index), tl.zeros([n, n], tl.float32))
        tl.store(p_out + index, acc.to(tl.bfloat16))

    a, b = (signed(16, 16, dtype=torch.bfloat16, device=device) for _ in range(2))
    want, errors = a.double() @ b.double(), {}
    for kernel in (guarded, bare):
        out = torch.empty_like(a)
        kernel[(1,)](a, b, out, 16)
        errors[kernel.fn.__name__] = oracle.relative_error(out, want)
    # Rounded as torch rounds: what is cut off instead errs by twice that.
    assert errors["guarded"] < 1.1 * oracle.relative_error(want.to(torch.bfloat16), want)
    assert errors["bare"] > 2 * errors["guarded"]


# Rows so far apart that offsets pass 2**31 elements; memory that is not touched costs nothing.
FAR = """
import functools, torch
from fastlora.backends.triton import linear as lora
def far(rows, columns):
    step = (2**31 + 64) // (rows - 1)
    t = torch.empty((rows - 1) * step + columns, dtype=torch.float16)
    return t.as_strided((rows, columns), (step, 1)).copy_(torch.randn(rows, columns) / 4)
x, weight, A, B, y = far(5, 24), far(6, 24), far(3, 24), far(6, 3), far(5, 6)
none, needs = (None, 0.5, 0.0, None), [1, 0, 0, 1, 1, 0]
near = functools.partial(torch.testing.assert_close, rtol=1e-2, atol=1e-2)
want = torch.addmm(x @ weight.T, x @ A.T, B.T, alpha=0.5)
for path in ("one_pass", "two_pass", "library"):
    got, h = lora.lora_linear(x, weight, None, A, B, *none, path)
    near(got, want)
    dx, dA, dB = lora.lora_linear_backward(y, x, weight, A, B, h, *none[1:], needs, path)
    near(dx, torch.addmm(y @ weight, y @ B, A, alpha=0.5))
    near(dA, 0.5 * (y @ B).T @ x)
    near(dB, 0.5 * y.T @ h)
want = y + 0.5 * (x @ A.T) @ B.T
lora.lora_add_(y, h, x, A, B, *none)
near(y, want)
print("right")
"""


def test_linear_kernels_reach_offsets_past_two_to_31():
    """In a process of its own: a wrong address may end it."""
    result = forks.run(FAR, env=dict(os.environ))
    assert result.stdout == "right\n", result.stderr[-2000:]


def test_rank_block_pads_rank_to_16():
    """A rank step is padded to 16, not to the next power of two."""
    blocks = {R: configs.rank_block(R) for R in (1, 8, 16, 24, 40, 48, 64, 96, 100, 512)}
    assert blocks == {
        1: 16, 8: 16, 16: 16, 24: 32, 40: 16, 48: 16, 64: 64, 96: 32, 100: 16, 512: 64,
    }  # fmt: skip
    assert configs.rank_block(64, limit=32) == 32
    for R in range(1, 513):
        block = configs.rank_block(R)
        assert -(-R // block) * block == -(-R // 16) * 16


def test_every_path_has_a_runner():
    assert tuple(product._RUN) == PATHS
