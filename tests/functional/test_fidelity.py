"""The fidelity measure: what it computes, and what rounding is known to lose of a delta."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastlora import functional as F
from fastlora.functional.fidelity import _BLOCK, LOW_GAIN, Fidelity, measure
from tests.support.helpers import LAYOUTS, Spy, bits, sliced, transposed, unchanged

HALVES = [torch.bfloat16, torch.float16]
FLOATS = [*HALVES, torch.float32, torch.float64]


def adapters_for(N: int, K: int, *ranks: int, dtype: torch.dtype = torch.float32):
    return [
        (torch.randn(R, K).to(dtype), torch.randn(N, R).to(dtype), 0.5 + i)
        for i, R in enumerate(ranks)
    ]


def sum_of_deltas(adapters) -> Tensor:
    return sum(s * (B.double() @ A.double()) for A, B, s in adapters)


def merge_at_size(weight: Tensor, adapters, size: float) -> tuple[Tensor, list]:
    """The weight with the adapters at ``size`` = |d|/|W|, and the adapters so scaled."""
    scale = size * float(weight.double().norm() / sum_of_deltas(adapters).norm())
    scaled = [(A, B, s * scale) for A, B, s in adapters]
    after = weight.clone()
    F.merge_(after, scaled, receipt=False)
    return after, scaled


def fidelity_by_definition(before: Tensor, after: Tensor, adapters) -> Fidelity:
    W, M, d = before.double(), after.double(), sum_of_deltas(adapters)
    return Fidelity(
        gain=float(((M - W) * d).sum() / (d * d).sum()),
        error=float((M - W - d).norm() / d.norm()),
        changed=float((bits(before) != bits(after)).double().mean()),
        size=float(d.norm() / W.norm()),
    )


def assert_same(got: Fidelity, want: Fidelity) -> None:
    for name, value in vars(want).items():
        assert getattr(got, name) == pytest.approx(value, rel=1e-6, abs=1e-15), name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_measure_matches_definition_across_blocks(dtype, layout, device):
    """In several blocks, of which the last is short; nothing that was given is written."""
    N, K = 3 * _BLOCK // 640, 651
    adapters = [(A.to(device), B.to(device), s) for A, B, s in adapters_for(N, K, 3, 5)]
    before = layout(torch.randn(N, K).to(device, dtype))
    after, adapters = merge_at_size(before, adapters, 0.003)
    with unchanged(before, after, *(t for A, B, _ in adapters for t in (A, B))):
        found = measure(before, layout(after), adapters)
    assert_same(found, fidelity_by_definition(before, after, adapters))


@pytest.mark.parametrize("dtype", FLOATS)
def test_measure_accepts_adapters_of_any_dtype(dtype):
    before, adapters = torch.randn(20, 30), adapters_for(20, 30, 4, dtype=dtype)
    after, adapters = merge_at_size(before, adapters, 0.1)
    assert_same(measure(before, after, adapters), fidelity_by_definition(before, after, adapters))


@pytest.mark.parametrize(
    "dtype, size, low, high",
    [
        # bfloat16's half unit in the last place is 0.2 to 0.4 % of an element.
        (torch.bfloat16, 1e-3, 0.4, 0.65),
        (torch.bfloat16, 1e-2, 0.98, 1.01),
        (torch.bfloat16, 1e-1, 0.999, 1.001),
        (torch.float16, 1e-4, 0.3, 0.6),
        (torch.float16, 1e-3, 0.98, 1.01),
        (torch.float32, 1e-3, 0.999999, 1.000001),
    ],
)
def test_gain_falls_as_rounding_loses_small_deltas(dtype, size, low, high):
    before = (torch.randn(256, 256) / 16).to(dtype)
    found = measure(before, *merge_at_size(before, adapters_for(256, 256, 16), size))
    assert low < found.gain < high
    assert (found.gain < LOW_GAIN) == (high < LOW_GAIN)
    assert found.size == pytest.approx(size, rel=1e-3)


def test_measure_allocates_nothing_of_the_weights_size():
    N, K = 16 * _BLOCK // 64, 64
    before, adapters = torch.randn(N, K).bfloat16(), adapters_for(N, K, 1)
    after = before.clone()
    with Spy() as spy:
        measure(before, after, adapters)
    assert spy.sizes()[0] <= _BLOCK


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_measure_of_empty_weight_is_perfect(shape):
    weight = torch.randn(shape)
    assert measure(weight, weight, adapters_for(*shape, 2)) == Fidelity(1.0, 0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    "adapters", [[], adapters_for(6, 8, 0), [(torch.zeros(2, 8), torch.ones(6, 2), 1.0)]]
)
def test_measure_without_delta_loses_nothing(adapters):
    weight = torch.randn(6, 8)
    assert measure(weight, weight, adapters) == Fidelity(1.0, 0.0, 0.0, 0.0)
    other = weight.clone()
    other[0, 0] += 1
    found = measure(weight, other, adapters)
    assert (found.gain, found.error, found.changed) == (1.0, math.inf, 1 / 48)


def test_measure_of_zero_weight_has_full_gain():
    weight, adapters = torch.zeros(6, 8), adapters_for(6, 8, 2)
    after = weight.clone()
    F.merge_(after, adapters, receipt=False)
    found = measure(weight, after, adapters)
    assert found.gain == pytest.approx(1)
    assert (found.changed, found.size) == (1.0, math.inf)


def test_measure_leaves_out_elements_not_finite_before():
    before, adapters = torch.randn(64, 64), adapters_for(64, 64, 4)
    before[3, 5], before[9, 9] = math.nan, math.inf
    after, kept = before.clone(), torch.ones(64, 64, dtype=torch.bool)
    F.merge_(after, adapters, receipt=False)
    kept[3, 5] = kept[9, 9] = False
    d, moved = sum_of_deltas(adapters)[kept], (after.double() - before.double())[kept]
    found = measure(before, after, adapters)
    assert found.gain == pytest.approx(float((moved * d).sum() / (d * d).sum()))
    assert math.isfinite(found.error)
    assert math.isfinite(found.size)


def test_measure_counts_sign_of_zero_as_changed():
    before = torch.zeros(2, 2)
    after = before.clone()
    after[0, 0] = -0.0
    assert measure(before, after, []).changed == 0.25


def test_fidelity_prints_as_one_short_line():
    text = str(Fidelity(0.5321, 0.7912, 0.2214, 0.001))
    assert text == "gain 0.532, error 0.79, 22.1% changed, |d|/|W| 0.001"


@pytest.mark.parametrize(
    "before, after, adapters, error, says",
    [
        (torch.ones(2, 3).int(), torch.ones(2, 3), [], TypeError, "before: expected a float16"),
        (torch.ones(6), torch.ones(6), [], ValueError, r"before: expected shape \(N, K\)"),
        (torch.ones(2, 3), torch.ones(2, 3).half(), [], TypeError, "after: expected before's"),
        (torch.ones(2, 3), torch.ones(3, 2), [], ValueError, r"after: expected shape \(2, 3\)"),
        (torch.ones(2, 3), torch.ones(2, 3), adapters_for(2, 4, 1), ValueError, r"\(R, 3\)"),
        (torch.ones(2, 3), torch.ones(2, 3), adapters_for(3, 3, 1), ValueError, r"\(2, 1\)"),
    ],
)  # fmt: skip
def test_measure_names_argument_that_does_not_fit(before, after, adapters, error, says):
    with pytest.raises(error, match=says):
        measure(before, after, adapters)


def test_measure_accepts_weights_of_different_layouts():
    before, adapters = torch.randn(40, 50).bfloat16(), adapters_for(40, 50, 4)
    after, adapters = merge_at_size(before, adapters, 0.01)
    found = measure(transposed(before), sliced(after), adapters)
    assert_same(found, fidelity_by_definition(before, after, adapters))
