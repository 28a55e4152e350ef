"""The Triton kernels along each path to a product, against the oracle, in tiles small and large."""

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from fastlora.backends import dropout
from tests.support import oracle
from tests.support.helpers import (
    DTYPES,
    LAYOUTS,
    Spy,
    assert_accurate,
    contiguous,
    lora_linear,
    misaligned,
    operands,
    same_bits,
    signed,
)
from tests.thinning import skip_where

pytest.importorskip("triton", reason="triton is not installed")

from fastlora.backends.triton import linear as lora
from fastlora.backends.triton import product
from fastlora.kernels.choose import choice
from fastlora.kernels.choose.ledger import PATHS, Problem
from fastlora.kernels.linear import gemm
from fastlora.kernels.tile import configs, launch, numerics

# M, K, N, R; the last few have rows that tensor descriptors can read.
ODD = [
    (1, 63, 65, 4),
    (63, 31, 431, 16),
    (7, 1128, 9, 3),
    (5, 7, 2049, 2),
    (2049, 5, 6, 1),
    (3, 9, 11, 0),
    (0, 5, 7, 3),
    (3, 0, 7, 2),
    (3, 4, 0, 2),
    (19, 40, 35, 63),
]
ALIGNED = [(49, 64, 80, 24), (17, 24, 40, 130), (5, 16, 24, 512)]
SCALING, P, SEED = -0.75, 0.4, 0x1234_5678_9ABC_DEF1
# As small as a tile can be: several of them in each direction, and a part of one at the edges.
TINY = {
    "one_pass": configs.OnePass(16, 16, 16, 4, 2),
    "shrink": configs.Shrink(16, 16, 4, 2),
    "gemm": configs.Gemm(16, 16, 16, 2, 4, 2),
    "gemm_tma": configs.Gemm(16, 16, 16, 2, 4, 2),
    "expand": configs.Expand(16, 16, 4),
    "gradient": configs.Gradient(16, 16, 4, 2),
}

dtypes = pytest.mark.parametrize(
    "dtype, lora_dtype",
    [pair for name, pair in DTYPES.items() if name != "fp64"],
    ids=[name for name in DTYPES if name != "fp64"],
)
shapes = pytest.mark.parametrize("M, K, N, R", ODD + ALIGNED)
pytestmark = pytest.mark.usefixtures("triton_usable", "memory_holds_nan")


@pytest.fixture(params=["tiny", "default"])
def tiles(request, monkeypatch) -> str:
    if request.param == "tiny":
        for module in (product, lora):
            monkeypatch.setattr(module, "config_of", lambda kernel, *_: TINY[kernel])
    return request.param


def seeded(p: float, device: torch.device) -> tuple[float, Tensor | None]:
    return p, torch.tensor(SEED, device=device) if p else None


def not_here(path: str, device, dtype=torch.float32, M=19, R=5, drops_y=False) -> str | None:
    problem = Problem(M, 1, 1, R, dtype.itemsize)
    first = drops_y or dtype == torch.float16
    here = choice.possible(path, problem, launch.arch_of(device), first)
    return None if here else f"{path} does not run such a product here"


def dropping_not_here(path, device, dtype=torch.float32, M=9, R=3) -> str | None:
    return not_here(path, device, dtype, M, R, drops_y=True)


every_path = pytest.mark.parametrize("path", PATHS)


def paths(test):
    return every_path(skip_where(not_here)(test))


def dropping_paths(test):
    return every_path(skip_where(dropping_not_here)(test))


def assert_right(M, K, N, R, dtype, lora_dtype, p, path, device, layout=contiguous) -> None:
    """Output, h and all six gradients of both ops."""
    given = operands(M, K, N, R, dtype, lora_dtype, device)
    x, weight, bias, A, B, lora_bias = (layout(t) for t in given)
    p, seed = seeded(p, device)
    keep = {}
    if seed is not None:
        scale = dropout.keep_scale(p)
        keep = {"keep": dropout.keep_mask(M, K, p, seed), "keep_scale": scale}
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias, A, B, lora_bias)]
    plain = dict(zip(("bias", "lora_bias"), (leaves[2], leaves[5]), strict=True))
    unfused = lora_linear(leaves[0], leaves[1], leaves[3], leaves[4], SCALING, **plain, **keep)
    dy = layout(signed(M, N, dtype=dtype, device=device))
    unfused.backward(dy.contiguous())  # torch may take in what lies between rows

    y, h = lora.lora_linear(x, weight, bias, A, B, lora_bias, SCALING, p, seed, path)
    want = oracle.lora_linear(x, weight, A, B, SCALING, bias=bias, lora_bias=lora_bias, **keep)
    assert_accurate(y, want, unfused, dtype)
    seen = x.double() * (keep["keep"].double() * keep["keep_scale"] if keep else 1.0)
    assert oracle.relative_error(h, seen @ A.double().T) <= 4 * torch.finfo(dtype).eps
    own = signed(M, N, dtype=dtype, device=device)
    if path != "library":
        delta = oracle.lora_linear(x, None, A, B, SCALING, **keep)
        added, h = layout(own), torch.empty_like(h)
        lora.lora_add_(added, h, x, A, B, None, SCALING, p, seed, path if path in SUMS else None)
        assert_accurate(added, own.cpu().double() + delta, unfused, dtype)
    got = lora.lora_linear_backward(dy, x, weight, A, B, h, SCALING, p, seed, [True] * 6, path)
    grads = oracle.lora_linear_grads(dy, x, weight, A, B, SCALING, **keep)
    names = ("x", "weight", "bias", "lora_A", "lora_B", "lora_bias")
    for name, gradient, leaf in zip(names, got, leaves, strict=True):
        assert gradient.dtype == leaf.dtype
        assert_accurate(gradient, grads[name], leaf.grad, dtype)


# Paths that lora_add_ has.
SUMS = ("one_pass", "two_pass")


def large(M, N, dtype, lora_dtype, device) -> str | None:
    rare = dtype == torch.float16 or lora_dtype != torch.float32
    skips = device.type == "cpu" and 2049 in (M, N) and rare
    return (
        "interpreted: tests/functional/test_linear.py has the size in every dtype"
        if skips
        else None
    )


@dtypes
@paths
@shapes
@skip_where(large)
def test_a_path_matches_the_oracle(M, K, N, R, path, dtype, lora_dtype, device):
    assert_right(M, K, N, R, dtype, lora_dtype, 0.0, path, device)


@dropping_paths
@pytest.mark.parametrize("M, K, N, R", [ODD[0], ODD[9], (33, 32, 48, 24)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_path_drops_the_same_elements(M, K, N, R, path, dtype, tiles, device):
    assert_right(M, K, N, R, dtype, torch.float32, P, path, device)


@dropping_paths
def test_a_path_drops_everything(path, device):
    assert_right(9, 21, 17, 3, torch.float32, torch.float32, 1.0, path, device)


@paths
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_path_reads_any_layout(path, layout, dtype, device):
    """NaN lies around and between the elements of some."""
    assert_right(19, 37, 29, 5, dtype, torch.float32, 0.0, path, device, layout)


@dtypes
@paths
@pytest.mark.parametrize("M, K, N, R", [(33, 40, 72, 40), (49, 37, 21, 17)])
def test_many_tiles_in_each_direction(M, K, N, R, path, dtype, lora_dtype, tiles, device):
    assert_right(M, K, N, R, dtype, lora_dtype, 0.0, path, device)


def test_aligned_rows_are_read_by_descriptors(device, monkeypatch):
    """And others by the pointer twin."""
    if launch.arch_of(device) < 90:
        pytest.skip("tensor descriptors are for Hopper and later")
    taken = []
    real = gemm.gemm
    monkeypatch.setattr(product, "gemm", lambda *a, **k: (taken.append(k["tma"]), real(*a, **k)))
    plain = (None, SCALING, 0.0, None, "two_pass")
    for K, N, want in ((64, 80, True), (63, 80, False), (64, 79, False)):
        x, weight, _, A, B, _ = operands(49, K, N, 24, *[torch.float32] * 2, device)
        lora.lora_linear(x, weight, None, A, B, *plain)
        lora.lora_linear(misaligned(x), weight, None, A, B, *plain)
        assert taken == [want, False]
        taken.clear()


def test_a_path_that_cannot_run_is_refused(device):
    x, weight, _, A, B, _ = operands(3, 8, 8, 200, *[torch.float32] * 2, device)
    with pytest.raises(ValueError, match="path: 'one_pass' cannot run this product"):
        lora.lora_linear(x, weight, None, A, B, None, SCALING, 0.0, None, "one_pass")


def test_only_the_kernels_that_are_needed_run(device, monkeypatch):
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


def test_gradients_are_summed_in_parts(device, monkeypatch):
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


def test_a_large_scaling_does_not_overflow_float16(device):
    """h fits float16, scaling * h does not, y does: the factor meets the float32 sum alone."""
    x = torch.full((4, 16), 60.0, dtype=torch.float16, device=device)
    weight = torch.zeros(8, 16, dtype=torch.float16, device=device)
    A, B = torch.full_like(x[:2], 30.0), torch.full_like(x[:1, :2], 1e-4).expand(8, 2)
    for path in ("one_pass", "two_pass", "library"):
        y, h = lora.lora_linear(x, weight, None, A, B, None, 64.0, 0.0, None, path)
        want = 64.0 * x.double() @ A.double().T @ B.double().T
        assert h.max() * 64 > torch.finfo(torch.float16).max
        assert oracle.relative_error(y, want) < 1e-3


def test_adapters_of_a_wider_dtype_are_not_copied(device):
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


def test_bfloat16_is_wrong_under_the_interpreter_without_the_guard(device):
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


def test_offsets_beyond_two_to_the_31():
    """In a process of its own: a wrong address may end it."""
    result = subprocess.run(
        [sys.executable, "-c", FAR], capture_output=True, text=True, env=os.environ
    )
    assert result.stdout == "right\n", result.stderr[-2000:]


def test_ranks_cost_what_they_are():
    """A rank step is padded to 16, not to the next power of two."""
    blocks = {R: configs.rank_block(R) for R in (1, 8, 16, 24, 40, 48, 64, 96, 100, 512)}
    assert blocks == {
        1: 16, 8: 16, 16: 16, 24: 32, 40: 16, 48: 16, 64: 64, 96: 32, 100: 16, 512: 64,
    }  # fmt: skip
    assert configs.rank_block(64, limit=32) == 32
    for R in range(1, 513):
        block = configs.rank_block(R)
        assert -(-R // block) * block == -(-R // 16) * 16


def test_one_list_of_paths():
    assert tuple(product._RUN) == PATHS
