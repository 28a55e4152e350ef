"""The Triton kernels for one adapter, along each path and in many tiles, against the oracle."""

import pytest
import torch
from torch import Tensor

from fastlora.backends import dropout
from tests.support import oracle
from tests.support.helpers import (
    DTYPES,
    LAYOUTS,
    assert_accurate,
    contiguous,
    lora_linear,
    misaligned,
    operands,
    signed,
)
from tests.thinning import skip_where

pytest.importorskip("triton", reason="triton is not installed")

from fastlora.backends.triton import linear as lora
from fastlora.backends.triton import product
from fastlora.kernels.choose import choice
from fastlora.kernels.choose.ledger import PATHS, Problem
from fastlora.kernels.linear import gemm
from fastlora.kernels.tile import configs, launch

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


def reason_path_does_not_run(
    path: str, device, dtype=torch.float32, M=19, R=5, drops_y=False
) -> str | None:
    problem = Problem(M, 1, 1, R, dtype.itemsize)
    first = drops_y or dtype == torch.float16
    here = choice.possible(path, problem, launch.arch_of(device), first)
    return None if here else f"{path} does not run such a product here"


def reason_path_does_not_drop(path, device, dtype=torch.float32, M=9, R=3) -> str | None:
    return reason_path_does_not_run(path, device, dtype, M, R, drops_y=True)


every_path = pytest.mark.parametrize("path", PATHS)


def on_every_path(test):
    return every_path(skip_where(reason_path_does_not_run)(test))


def on_every_dropping_path(test):
    return every_path(skip_where(reason_path_does_not_drop)(test))


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


def too_large_for_interpreter(M, N, dtype, lora_dtype, device) -> str | None:
    rare = dtype == torch.float16 or lora_dtype != torch.float32
    skips = device.type == "cpu" and 2049 in (M, N) and rare
    return (
        "interpreted: tests/functional/test_linear.py has the size in every dtype"
        if skips
        else None
    )


@dtypes
@on_every_path
@shapes
@skip_where(too_large_for_interpreter)
def test_path_matches_oracle_with_gradients(M, K, N, R, path, dtype, lora_dtype, device):
    assert_right(M, K, N, R, dtype, lora_dtype, 0.0, path, device)


@on_every_dropping_path
@pytest.mark.parametrize("M, K, N, R", [ODD[0], ODD[9], (33, 32, 48, 24)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_path_drops_same_elements_as_oracle(M, K, N, R, path, dtype, tiles, device):
    assert_right(M, K, N, R, dtype, torch.float32, P, path, device)


@on_every_dropping_path
def test_path_drops_everything_at_p_1(path, device):
    assert_right(9, 21, 17, 3, torch.float32, torch.float32, 1.0, path, device)


@on_every_path
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_path_reads_operands_of_any_layout(path, layout, dtype, device):
    """NaN lies around and between the elements of some."""
    assert_right(19, 37, 29, 5, dtype, torch.float32, 0.0, path, device, layout)


@dtypes
@on_every_path
@pytest.mark.parametrize("M, K, N, R", [(33, 40, 72, 40), (49, 37, 21, 17)])
def test_path_is_right_across_many_tiles(M, K, N, R, path, dtype, lora_dtype, tiles, device):
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
