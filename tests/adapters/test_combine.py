"""Adapters of one layer combined as PEFT's ``add_weighted_adapter`` combines them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import peft
import pytest
import torch
from torch import nn

from fastlora.adapters.combine import PRUNED, TYPES, combine
from tests.support.combined import Adapter, assert_near, delta, error_scale, weighted_sum_of_deltas
from tests.support.models import llama, quiet, randomise_lora

TARGETS = ["q_proj", "up_proj", "down_proj"]
ANY_RANKS = [name for name in TYPES if name == "cat" or name.endswith("svd")]
ONE_RANK = [name for name in TYPES if name not in ANY_RANKS]
WEIGHTS = [(0.7, 0.4, 1.1), (-0.5, 1.2, 0.3), (0.0, 1.0, -1.0), (-0.6, -0.9), (0.0, 0.0)]

pytestmark = [
    quiet,
    pytest.mark.filterwarnings("ignore:The density .* no pruning will be performed"),
]


def model_with_adapters(*ranks: int, **options: Any) -> nn.Module:
    """A PEFT model with adapters a, b, …, of other scalings each."""
    torch.manual_seed(0)  # fixtures of the module come before each test's own seed
    dtype = options.pop("dtype", torch.float32)
    configs = [
        peft.LoraConfig(r=r, lora_alpha=3 + 2 * i, target_modules=TARGETS, **options)
        for i, r in enumerate(ranks)
    ]
    names = "abc"[: len(ranks)]
    keep = {"autocast_adapter_dtype": False}
    model = peft.get_peft_model(llama(dtype=dtype), configs[0], adapter_name="a", **keep)
    for name, config in zip(names[1:], configs[1:], strict=True):
        model.add_adapter(name, config, **keep)
    return randomise_lora(model).eval()


@pytest.fixture(scope="module")
def peft_model_of_equal_ranks() -> nn.Module:
    return model_with_adapters(4, 4, 4)


@pytest.fixture(scope="module")
def peft_model_of_different_ranks() -> nn.Module:
    return model_with_adapters(3, 5, 4)


def pairs(
    model: nn.Module, weights: Sequence[float], combination_type: str, **options: Any
) -> Iterator[tuple[Adapter, Adapter, list[Adapter]]]:
    """Layer by layer: our combination of the first adapters, PEFT's, and the adapters."""
    names = [*"abc"[: len(weights)]]
    inject = model.base_model.inject_adapter

    def then_seed(*args: Any, **kwargs: Any) -> None:
        inject(*args, **kwargs)  # draws the new adapter's initial values
        torch.manual_seed(7)

    model.base_model.inject_adapter = then_seed
    try:
        model.add_weighted_adapter(names, list(weights), "new", combination_type, **options)
        torch.manual_seed(7)
        for layer in model.modules():
            if isinstance(layer, peft.tuners.lora.Linear):
                parts = [factors(layer, name) for name in names]
                yield (
                    combine(parts, weights, combination_type, **options),
                    factors(layer, "new"),
                    parts,
                )
    finally:
        del model.base_model.inject_adapter
        model.delete_adapter("new")


def seeded(*args: Any, **kwargs: Any) -> Adapter:
    torch.manual_seed(7)
    return combine(*args, **kwargs)


def factors(layer: nn.Module, name: str) -> Adapter:
    A, B = layer.lora_A[name].weight, layer.lora_B[name].weight
    return A.detach(), B.detach(), layer.scaling[name]


def assert_same_factors(got: Adapter, want: Adapter) -> None:
    torch.testing.assert_close(got[0], want[0])
    torch.testing.assert_close(got[1], want[1])


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("combination_type", TYPES)
def test_combine_equals_peft_for_equal_ranks(peft_model_of_equal_ranks, combination_type, weights):
    for got, want, parts in pairs(
        peft_model_of_equal_ranks, weights, combination_type, density=0.43
    ):
        assert_near(got, want, error_scale(parts, weights))
        assert got[2] == want[2] == 1
        if combination_type.endswith("_svd"):
            assert_same_factors(got, want)
        elif combination_type != "svd":  # whose singular vectors may have other signs
            assert torch.equal(got[0], want[0])
            assert torch.equal(got[1], want[1])


@pytest.mark.parametrize("combination_type", ANY_RANKS)
def test_combine_equals_peft_for_different_ranks(peft_model_of_different_ranks, combination_type):
    weights = (0.7, -0.4, 1.1)
    for got, want, parts in pairs(
        peft_model_of_different_ranks, weights, combination_type, density=0.43
    ):
        assert got[0].shape == want[0].shape
        assert_near(got, want, error_scale(parts, weights))


@pytest.mark.parametrize("combination_type", TYPES)
def test_combine_scales_a_single_adapter(peft_model_of_equal_ranks, combination_type):
    """Whatever the type, in PEFT too."""
    for got, want, parts in pairs(
        peft_model_of_equal_ranks, [-0.3], combination_type, density=0.43
    ):
        assert torch.equal(got[0], want[0])
        assert torch.equal(got[1], want[1])
        torch.testing.assert_close(delta(got), -0.3 * delta(parts[0]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("combination_type", TYPES)
def test_combine_matches_peft_in_half_precision(combination_type, dtype):
    """PEFT rounds dense deltas before it prunes them, cat's weights one by one, and svd not at all:
    there ours is held to what it gives of the same adapters in float32."""
    model, weights = model_with_adapters(4, 4, dtype=dtype), (0.7, -0.4)
    for got, want, parts in pairs(model, weights, combination_type, density=0.5):
        assert got[0].dtype == got[1].dtype == dtype
        if combination_type in ONE_RANK:
            assert torch.equal(got[0], want[0])
            assert torch.equal(got[1], want[1])
            continue
        wide = [(A.float(), B.float(), s) for A, B, s in parts]
        half, single = (seeded(a, weights, combination_type, density=0.5) for a in (parts, wide))
        tolerance = 2 * torch.finfo(dtype).eps
        assert_near(half, single, error_scale(parts, weights), tolerance)
        if combination_type in ("cat", "svd"):
            assert_near(got, want, error_scale(parts, weights), tolerance)


@pytest.mark.parametrize("svd_rank", [1, 3, 6, 8, 20])
@pytest.mark.parametrize("combination_type", ["svd", "ties_svd"])
def test_svd_rank_cuts_as_in_peft(peft_model_of_equal_ranks, combination_type, svd_rank):
    weights, options = (0.7, -0.4), {"svd_rank": svd_rank, "density": 0.43}
    for got, want, parts in pairs(peft_model_of_equal_ranks, weights, combination_type, **options):
        assert_near(got, want, error_scale(parts, weights))
        # Of two adapters of rank 4 no more is there; PEFT fills up with directions of nothing.
        assert len(got[0]) == (min(svd_rank, 8) if combination_type == "svd" else svd_rank)


@pytest.mark.parametrize("quantile", [0.8, 0.99, 1.0])
@pytest.mark.parametrize("name", [f"{name}_svd" for name in PRUNED])
def test_svd_clamp_of_dense_deltas_equals_peft(peft_model_of_equal_ranks, name, quantile):
    for got, want, _ in pairs(
        peft_model_of_equal_ranks, (0.7, -0.4), name, density=0.43, svd_clamp=quantile
    ):
        assert_same_factors(got, want)


@pytest.mark.parametrize("quantile", [0.8, 0.99, 1.0])
def test_svd_clamp_of_factors_equals_peft(peft_model_of_different_ranks, quantile):
    """The quantile is of signed numbers, so PEFT's singular vectors are given our signs first."""
    weights = (0.7, -0.4)
    clamped = pairs(peft_model_of_different_ranks, weights, "svd", svd_clamp=quantile)
    for got, _, parts in clamped:
        A = combine(parts, weights, "svd")[0]
        U, S, Vh = torch.linalg.svd(weighted_sum_of_deltas(parts, weights).float())
        signs = (A * Vh[: len(A)]).sum(1).sign()
        Vh, U = Vh[: len(A)] * signs[:, None], U[:, : len(A)] * S[: len(A)] * signs
        limit = torch.cat([U.flatten(), Vh.flatten()]).quantile(quantile)
        torch.testing.assert_close(got[0], Vh.clamp(-limit, limit), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(got[1], U.clamp(-limit, limit), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", ["total", "frequency"])
@pytest.mark.parametrize("name", ["ties", "dare_ties", "ties_svd", "dare_ties_svd"])
def test_majority_sign_method_equals_peft(peft_model_of_equal_ranks, name, method):
    weights, options = (0.7, 0.4, -1.1), {"density": 0.8, "majority_sign_method": method}
    for got, want, _ in pairs(peft_model_of_equal_ranks, weights, name, **options):
        assert_same_factors(got, want)


@pytest.mark.parametrize("density", [0.0, 1e-4, 1.0])
@pytest.mark.parametrize("name", [*PRUNED, *(f"{name}_svd" for name in PRUNED)])
def test_density_of_0_and_1_equals_peft(peft_model_of_equal_ranks, name, density):
    if density == 0 and name.startswith("dare"):
        density = 0.01  # PEFT divides by zero, we refuse
    weights = (0.7, -0.4)
    for got, want, parts in pairs(peft_model_of_equal_ranks, weights, name, density=density):
        assert_near(got, want, max(float(delta(want).norm()), error_scale(parts, weights)))
        assert name.startswith("dare") or density == 1 or not delta(got).any()
