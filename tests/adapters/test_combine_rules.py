"""combine on one layer: its results, its refusals and its memory."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlora.adapters.combine import TYPES, combine
from tests.support.combined import (
    assert_near,
    delta,
    error_scale,
    random_adapters,
    weighted_sum_of_deltas,
)
from tests.support.helpers import Spy, unchanged

ONE_RANK = ["linear", "magnitude_prune", "dare_linear", "ties", "dare_ties"]


NAN, INF = float("nan"), float("inf")
GOOD = {"adapters": random_adapters(2, 2), "weights": [1.0, 1.0]}
SPOILT = random_adapters(2, 2)
SPOILT[1][1][3, 1] = NAN
REFUSED = {
    "type": ({"combination_type": "slerp"}, ValueError, "combination_type: expected one of svd"),
    "linear_svd": ({"combination_type": "linear_svd"}, ValueError, "got 'linear_svd'"),
    "lengths": ({"weights": [1.0]}, ValueError, "one for each of 2 adapters, got 1"),
    "none": ({"adapters": [], "weights": []}, ValueError, "adapters: expected at least one"),
    "nan weight": ({"weights": [1.0, NAN]}, ValueError, r"weights\[1\]: expected a finite"),
    "inf weight": ({"weights": [INF, 1.0]}, ValueError, r"weights\[0\]: expected a finite"),
    "text weight": ({"weights": ["1", 1.0]}, TypeError, r"weights\[0\]: expected a number"),
    "weights": ({"weights": 1.0}, TypeError, "weights: expected a list of numbers, got float"),
    "tensor": ({"adapters": torch.ones(2)}, TypeError, "adapters: expected a list, got Tensor"),
    "pair": ({"adapters": [1, 2]}, TypeError, r"adapters\[0\]: expected \(lora_A, lora_B"),
    "columns": (
        {"adapters": random_adapters(2) + random_adapters(2, K=9)},
        ValueError,
        r"one shape .*\(12, 10\), \(12",
    ),
    "rows": (
        {"adapters": random_adapters(2) + random_adapters(2, N=9)},
        ValueError,
        r"one shape .*\(12, 10\), \(9",
    ),
    "numbers": ({"adapters": SPOILT}, ValueError, r"adapters\[1\]: lora_B: expected finite"),
    "rank 0": (
        {"adapters": random_adapters(0, 2)},
        ValueError,
        r"adapters\[0\]: .* R at least 1, got \(0",
    ),
    "integers": (
        {
            "adapters": [
                *random_adapters(2),
                (torch.ones(2, 10, dtype=torch.int64), torch.ones(12, 2), 1.0),
            ]
        },
        TypeError,
        r"adapters\[1\]: lora_A: expected a tensor of float16 to float64, got torch.int64",
    ),
    "scaling": (
        {"adapters": [*random_adapters(2), (torch.ones(2, 10), torch.ones(12, 2), NAN)]},
        ValueError,
        r"adapters\[1\]: scaling: expected a finite number, got nan",
    ),
    "vector": (
        {"adapters": [*random_adapters(2), (torch.ones(10), torch.ones(12, 2), 1.0)]},
        ValueError,
        r"adapters\[1\]: expected lora_A \(R, K\)",
    ),
    "svd_rank 0": ({"svd_rank": 0}, ValueError, "svd_rank: expected a whole number of 1 or more"),
    "svd_rank": ({"svd_rank": 2.0}, TypeError, "svd_rank: expected a whole number of 1 or more"),
    "svd_clamp": ({"svd_clamp": 1.5}, ValueError, r"svd_clamp: expected a number in \[0, 1\]"),
    "low clamp": ({"svd_clamp": 0.0}, ValueError, "svd_clamp: expected a quantile that limits"),
    "full": ({"svd_full_matrices": 1}, TypeError, "svd_full_matrices: expected a bool, got 1"),
    "driver": ({"svd_driver": "gesvdz"}, ValueError, "svd_driver: expected one of None, gesvd"),
    "cpu driver": ({"svd_driver": "gesvd"}, ValueError, "svd_driver: CUDA alone has drivers"),
    "density": (
        {"combination_type": "ties"},
        ValueError,
        r"density: ties needs a number in \[0, 1\], got None",
    ),
    "density 1.1": ({"density": 1.1}, ValueError, r"density: expected a number in \[0, 1\]"),
    "density < 0": ({"density": -0.1}, ValueError, r"density: expected a number in \[0, 1\]"),
    "density nan": ({"density": NAN}, ValueError, "density: expected a finite number"),
    "dare 0": (
        {"combination_type": "dare_ties_svd", "density": 0},
        ValueError,
        "density: dare_ties_svd divides by it, got 0",
    ),
    "majority": (
        {"majority_sign_method": "loudest"},
        ValueError,
        "majority_sign_method: expected one of total, frequency, got 'loudest'",
    ),
}


@pytest.mark.parametrize("combination_type, rank", [("svd", 8), ("ties_svd", 10)])
def test_svd_rank_beyond_the_layer_is_cut(combination_type, rank):
    """Where PEFT fails."""
    adapters = random_adapters(4, 4)
    A, B, _ = combine(adapters, [1.0, 2.0], combination_type, svd_rank=99, density=1.0)
    assert A.shape == (rank, 10)
    assert B.shape == (12, rank)
    if combination_type == "svd":
        torch.testing.assert_close(B @ A, weighted_sum_of_deltas(adapters, [1.0, 2.0]).float())


def test_svd_accepts_more_ranks_than_layer_has():
    adapters, weights = random_adapters(5, 6, N=4, K=7), [0.5, -1.5]
    got = combine(adapters, weights, svd_rank=11)
    assert got[0].shape == (4, 7)
    assert_near(got, (*combine(adapters, weights, "cat")[:2], 1.0), error_scale(adapters, weights))


def test_svd_full_matrices_change_nothing():
    adapters = random_adapters(3, 3)
    options = {"density": 0.5, "svd_rank": 4}
    one, two = (
        combine(adapters, [1.0, 1.0], "ties_svd", svd_full_matrices=full, **options)
        for full in (False, True)
    )
    assert_near(one, two, error_scale(adapters, [1.0, 1.0]))


def test_linear_combination_has_cross_terms():
    """sqrt|s| on each side: what PEFT computes is not the weighted sum."""
    A, B = torch.eye(2)[:1], torch.ones(1, 1)
    got = combine([(A, B, 1.0), (A.flip(1), 3 * B, 1.0)], [4.0, -1.0], "linear")
    assert torch.equal(got[0], torch.tensor([[2.0, -1.0]]))
    assert torch.equal(got[1], torch.tensor([[5.0]]))


@pytest.mark.parametrize("combination_type", TYPES)
def test_dense_deltas_are_made_only_for_pruning(combination_type):
    N, K = 96, 80
    adapters = random_adapters(4, 4, N=N, K=K)
    with Spy() as spy:
        combine(adapters, [0.5, -1.5], combination_type, density=0.5, svd_clamp=0.99)
    if combination_type.endswith("_svd"):
        assert spy.sizes()[0] == N * K
    else:
        assert spy.sizes()[0] <= (N + K) * 8


@pytest.mark.parametrize("combination_type", TYPES)
def test_combine_leaves_its_adapters_unchanged(combination_type):
    adapters = [(A.requires_grad_(), B.requires_grad_(), s) for A, B, s in random_adapters(3, 3)]
    with unchanged(adapters):
        A, B, _ = combine(adapters, [1.0, -1.0], combination_type, density=0.5)
    for t in (A, B):
        assert not t.requires_grad
        assert t.untyped_storage().nbytes() == t.nbytes  # nothing larger lives on in it
    single = combine(adapters[:1], [2.0], combination_type, density=1.0)
    single[0].zero_()
    assert adapters[0][0].any()


def test_combine_promotes_dtypes_as_torch():
    half, single, double = (
        random_adapters(2, dtype=dtype)[0]
        for dtype in (torch.float16, torch.float32, torch.float64)
    )
    other = random_adapters(2, dtype=torch.bfloat16)[0]
    for adapters, dtype in [
        ((half, half), torch.float16),
        ((half, other), torch.float32),
        ((half, single), torch.float32),
        ((half, double), torch.float64),
    ]:
        for name in ("svd", "cat", "linear"):
            assert {t.dtype for t in combine(adapters, [1.0, 1.0], name)[:2]} == {dtype}
    got = combine([double, double], [0.1, 0.2], "cat")
    torch.testing.assert_close(
        delta(got), weighted_sum_of_deltas([double, double], [0.1, 0.2]), rtol=1e-14, atol=1e-14
    )


@pytest.mark.parametrize("case", REFUSED)
def test_combine_refuses_bad_arguments_by_name(case):
    arguments, kind, message = REFUSED[case]
    with pytest.raises(kind, match=message):
        combine(**(GOOD | arguments))


@pytest.mark.parametrize("combination_type", ONE_RANK)
def test_combine_names_ranks_that_differ(combination_type):
    with pytest.raises(ValueError, match=rf"{combination_type} needs .*\[2, 3\]; svd, cat"):
        combine(random_adapters(2, 3), [1.0, 1.0], combination_type, density=0.5)


@pytest.mark.parametrize("combination_type", TYPES)
def test_combine_refuses_results_that_overflow(combination_type):
    huge = [(100 * A, 100 * B, 1e38) for A, B, _ in random_adapters(2, 2)]
    with pytest.raises(ValueError, match="weights: the combined adapter would not fit"):
        combine(huge, [1e300, 1.0], combination_type, density=0.5)
    halves = [(A.half(), B.half(), 1e9) for A, B, _ in random_adapters(2, 2)]
    with pytest.raises(ValueError, match=r"would not fit torch\.float16"):
        combine(halves, [1.0, 1.0], combination_type, density=0.5)


NUMBERS = st.integers(-200, 200).map(lambda n: n / 100)


@settings(max_examples=60, deadline=None)
@given(
    N=st.integers(1, 9),
    K=st.integers(1, 9),
    ranks=st.lists(st.integers(1, 5), min_size=2, max_size=4),
    data=st.data(),
)
def test_cat_and_full_svd_are_the_weighted_sum(N, K, ranks, data):
    weights = [data.draw(NUMBERS) for _ in ranks]
    torch.manual_seed(data.draw(st.integers(0, 99)))
    adapters = [(torch.randn(r, K), torch.randn(N, r), data.draw(NUMBERS)) for r in ranks]
    want, scale = weighted_sum_of_deltas(adapters, weights), error_scale(adapters, weights)
    cat = combine(adapters, weights, "cat")
    svd = combine(adapters, weights, "svd", svd_rank=sum(ranks))
    assert len(cat[0]) == sum(ranks)
    assert len(svd[0]) == min(sum(ranks), N, K)
    for got in (cat, svd):
        assert float((delta(got) - want).norm()) <= 1e-6 * scale


@settings(max_examples=30, deadline=None)
@given(rank=st.integers(1, 6), ranks=st.lists(st.integers(1, 4), min_size=2, max_size=3))
def test_short_svd_loses_no_more_than_needed(rank, ranks):
    """Eckart and Young: the distance is that of the singular values left out."""
    adapters, weights = random_adapters(*ranks, dtype=torch.float64), [0.5, -1.5, 1.0][: len(ranks)]
    want = weighted_sum_of_deltas(adapters, weights)
    lost = float((delta(combine(adapters, weights, svd_rank=rank)) - want).norm())
    assert lost == pytest.approx(float(torch.linalg.svdvals(want)[rank:].norm()), abs=1e-10)


def test_svd_is_accurate_when_adapters_nearly_cancel():
    """Of the difference between two states of one training run every digit is there."""
    (A, B, s), (dA, dB, _) = random_adapters(4, 4, N=40, K=30)
    later = (A + 1e-3 * dA, B + 1e-3 * dB, s)
    got = delta(combine([later, (A, B, s)], [1.0, -1.0], svd_rank=8))
    want = delta(later) - delta((A, B, s))
    assert float((got - want).norm() / want.norm()) < 1e-6
