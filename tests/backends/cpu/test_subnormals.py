"""What becomes of subnormal numbers: it depends on the instruction set and not on the size."""

import pytest
import torch
from torch import Tensor

import fastlora
from fastlora import functional as F
from fastlora.backends import native

if native.unusable() is not None:
    pytest.skip(str(native.unusable()), allow_module_level=True)

_FLUSHING = ("avx512_bf16", "amx_bf16", "amx_emulated")
_NORMAL = {torch.bfloat16: 2.0**-126, torch.float32: 2.0**-126, torch.float16: 2.0**-14}


def signed_between(low: int, high: int, *shape: int, dtype: torch.dtype) -> Tensor:
    """Signed, of magnitudes from 2**low up to 2**high."""
    exponents = torch.randint(low, high, shape)
    signs = torch.randint(0, 2, shape) * 2 - 1
    return (torch.ldexp(signs * (1 + torch.rand(shape, dtype=torch.float64)), exponents)).to(dtype)


def flush_as_bfloat16_does(t: Tensor, instruction_set: str, dtype: torch.dtype) -> Tensor:
    """bfloat16's instructions take and leave numbers below the normal ones as zeros."""
    flushes = instruction_set in _FLUSHING and dtype == torch.bfloat16
    return t.double().where(t.abs() >= _NORMAL[dtype], 0.0) if flushes else t.double()


# One row, the rests of tiles, several blocks.
SHAPES = [(1, 8, 8, 2), (5, 67, 35, 7), (40, 130, 66, 16)]


@pytest.mark.parametrize("lora", ["same", "fp32"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("tiny", ["x", "W", "A", "B", "y"])
def test_subnormals_follow_instruction_set_at_any_size(tiny, dtype, lora, instruction_set):
    """Inputs and adapters, half of each normal, and results; one answer at every size."""
    half = dtype == torch.float16
    lora_dtype = torch.float32 if lora == "fp32" else dtype
    subnormal, large = ((-18, -10), (1, 3)) if half else ((-131, -122), (40, 42))
    small = (-13, -11) if half else (-71, -69)
    for M, K, N, R in SHAPES:
        of = {"x": (M, K), "W": (N, K), "A": (R, K), "B": (N, R)}
        ranges = dict.fromkeys(of, small if tiny == "y" else large) | {tiny: subnormal}
        t = {
            name: signed_between(*ranges[name], *shape, dtype=lora_dtype if name in "AB" else dtype)
            for name, shape in of.items()
        }
        # The weight and the adapter one by one: the larger part would hide the other's zeros.
        t["B" if tiny in "yW" else "W"].zero_()
        seen = {
            name: flush_as_bfloat16_does(value, instruction_set, dtype) for name, value in t.items()
        }
        delta = (seen["x"] @ seen["A"].T) @ seen["B"].T
        want = flush_as_bfloat16_does(
            (seen["x"] @ seen["W"].T + 0.5 * delta).to(dtype), instruction_set, dtype
        )
        # Else many rows' base product is torch's.
        with fastlora.batch_invariant():
            got = F.lora_linear(t["x"], t["W"], t["A"], t["B"], 0.5).double()
        eps = torch.finfo(dtype).eps
        # float32 sums of subnormals round at each step.
        unit = _NORMAL[dtype] * eps * K**0.5 if tiny == "y" else 0.0
        assert bool(want.any()) == bool(got.any())
        assert (got - want).norm() <= 8 * eps * want.norm() + unit * want.numel() ** 0.5
