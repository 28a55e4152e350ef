"""Tiles in ordinary instructions have the bits of AMX: tests of the one are of the other too."""

import itertools
import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fastlora.backends import native
from fastlora.backends.cpu import linear as cpu_linear
from tests.support.helpers import signed

if native.unusable() is not None:
    pytest.skip(str(native.unusable()), allow_module_level=True)
from tests.support.tile_calls import BF16, Batch, assert_emulation_has_bits_of_hardware

pytestmark = pytest.mark.usefixtures("hardware")

F32 = torch.float32
# (K, N, R): whole tiles and steps, rests of every kind, ranks in place and copied.
SHAPES = [
    (64, 64, 8), (67, 83, 17), (33, 31, 1), (130, 96, 33), (16, 17, 100), (95, 130, 200),
    (32, 32, 2), (1, 1, 16), (160, 64, 64), (31, 40, 0), (64, 128, 16), (5, 100, 32),
]  # fmt: skip
# What a call has beside its rows, by name.
KINDS = {
    "one": lambda b: b.one(),
    "one+bias": lambda b: b.one(signed(b.B.shape[1], dtype=b.B.dtype, device=b.B.device)),
    "many": lambda b: b.multi(),
    "many+ranks": lambda b: b.with_options().multi(),
    "sorted": lambda b: replace(b, ids=b.ids.sort().values).multi(),
    "by tiles": lambda b: replace(b, ids=torch.arange(len(b.ids)) // 16 % 3).multi(),
    "pages": lambda b: b.with_options().multi(page=4),
}


def drawn_again(kind: str, b: Batch):
    """The call with the same random options each time."""
    seed = int(torch.randint(2**31, ()))

    def call() -> tuple[Tensor, Tensor]:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return KINDS[kind](b)

    return call


@pytest.mark.parametrize("M", [1, 2, 15, 16, 17, 33, 48, 49, 64, 96, 97, 130, 193, 300, 513])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("onto", [False, True])
@pytest.mark.parametrize("lora_dtype", [BF16, F32])
def test_emulation_has_bits_of_hardware_at_any_size(M, kind, onto, lora_dtype):
    for K, N, R in random.Random(repr((M, kind, onto))).sample(SHAPES, 3):
        if kind == "pages" and R == 0:
            continue
        b = Batch.of(M, K, N, R, 1 if kind.startswith("one") else 3, lora_dtype)
        call = drawn_again(kind, b.onto() if onto else b)
        assert_emulation_has_bits_of_hardware(call)


@pytest.mark.parametrize("K", [2080, 4097])
@pytest.mark.parametrize("kind", ["one", "many", "sorted"])
def test_emulation_has_bits_of_hardware_where_K_is_cut(K, kind):
    for N in (33, 64):
        b = Batch.of(200, K, N, 17, 1 if kind == "one" else 3)
        assert_emulation_has_bits_of_hardware(drawn_again(kind, b))


# Of float32 factors also numbers that bfloat16 rounds up to a normal one.
EXTREMES = [0.0, -0.0, 1e-39, -1e-39, 2.0**-126, -(2.0**-126) * (1 - 2**-9), 2.0**-133]
NOT_FINITE = [torch.inf, -torch.inf, torch.nan]


def sprinkle(t: Tensor, values: list[float], share: float) -> None:
    for value in values:
        t[torch.rand(t.shape) < share] = value


@pytest.mark.parametrize("where", ["x", "W", "A", "B", "all"])
@pytest.mark.parametrize("kind", ["one", "many+ranks", "pages"])
@pytest.mark.parametrize("onto", [False, True])
def test_emulation_has_bits_of_hardware_of_extreme_numbers(where, kind, onto):
    """Zeros of both signs, subnormal numbers, Inf and NaN in one operand or in all."""
    names = "xWABy" if where == "all" else where
    sizes = itertools.product((5, 40, 100), ((67, 83, 17), (64, 64, 8)), (BF16, F32))
    for M, (K, N, R), lora_dtype in sizes:
        b = Batch.of(M, K, N, R, 1 if kind == "one" else 3, lora_dtype)
        for name in names:
            sprinkle(getattr(b, name), EXTREMES, 0.05)
            sprinkle(getattr(b, name), NOT_FINITE, 0.003)
        call = drawn_again(kind, b.onto() if onto else b)
        assert_emulation_has_bits_of_hardware(call)


@pytest.mark.parametrize("size", [2.0**-66, 2.0**-60, 2.0**61])
def test_emulation_has_bits_of_hardware_where_sums_leave_the_normal_range(size):
    for M, onto in itertools.product((3, 40, 100), (False, True)):
        b = Batch.of(M, 130, 83, 17, 3)
        b = replace(b, x=b.x * size, W=b.W * size, A=b.A * size)
        assert_emulation_has_bits_of_hardware((b.onto() if onto else b).multi)


@pytest.mark.parametrize("M", [1, 2, 31, 32, 33, 100, 513])
@pytest.mark.parametrize("R, C", [(1, 1), (8, 64), (17, 83), (49, 33), (200, 130)])
@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("turned", [False, True])
def test_gradient_of_emulation_has_bits_of_hardware(M, R, C, dtype, turned):
    on = {"dtype": BF16, "device": torch.device("cpu")}
    left, right = signed(M, R, **on), signed(M, C, **on)
    sprinkle(left, EXTREMES, 0.02)
    sprinkle(right, [*EXTREMES, *NOT_FINITE], 0.002)
    like = torch.empty(0, dtype=dtype)
    assert_emulation_has_bits_of_hardware(
        lambda: (cpu_linear.gradient(left, right, like, 0.3, transposed=turned),)
    )
