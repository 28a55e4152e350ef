"""`fastlora check` judges linear ops by a formula that agrees with the oracle."""

from __future__ import annotations

import math

import pytest
import torch

from fastlora.backends.dropout import keep_mask, keep_scale
from fastlora.commands.check import judging
from fastlora.commands.check import linear as formula
from tests.support import oracle

CPU = torch.device("cpu")


@pytest.mark.parametrize("case", formula.list_cases(quick=True, gpu=False), ids=str)
def test_check_formula_agrees_with_the_oracle(case):
    subject = formula.Subject(case, "fp32", CPU, torch.Generator().manual_seed(0))
    t, want = subject.tensors, subject.want
    keep, scale = None, 1.0
    if case.dropout:
        keep = keep_mask(case.M, case.K, case.dropout, subject.seed)
        scale = keep_scale(case.dropout)
    factors = (t["lora_A"], t["lora_B"], formula.SCALING)
    drop = {"keep": keep, "keep_scale": scale}
    biases = {name: t[name] for name in ("bias", "lora_bias")} if case.biases else {}
    y = oracle.lora_linear(t["x"], t["weight"], *factors, **biases, **drop)
    torch.testing.assert_close(want["y"], y)
    biases.pop("bias", None)
    added = t["y"] + oracle.lora_linear(t["x"], None, *factors, **biases, **drop)
    torch.testing.assert_close(want["y added to"], added)
    weight = t["weight"] if case.weight else None
    grads = oracle.lora_linear_grads(t["dy"], t["x"], weight, *factors, **drop)
    for name, grad in grads.items():
        if f"d{name}" in want and (weight is not None or name not in ("weight", "bias")):
            torch.testing.assert_close(want[f"d{name}"], grad)
    assert {"x", "lora_A", "lora_B"} <= set(grads)


def test_error_ratio_of_tf32_uses_rounded_operands():
    a, b = torch.randn(64, 64), torch.randn(64, 64)
    want = a.double() @ b.double()
    cut = judging.choose_product("tf32")(a, b)
    assert 1e-4 < oracle.relative_error(cut, want) < 2e-3
    assert judging.compute_error_ratio(cut, want, cut, "tf32") < 1
    assert judging.compute_error_ratio(cut, want, a @ b, "fp32") > 10


def test_error_ratio_compares_with_unfused_torch():
    want = torch.randn(40, 40, dtype=torch.float64)
    unfused = want * 1.01
    assert judging.compute_error_ratio(want * 1.019, want, unfused, "fp32") < 1
    assert judging.compute_error_ratio(want * 1.021, want, unfused, "fp32") > 1
    assert not judging.compute_error_ratio(want * math.nan, want, unfused, "fp32") <= 1
    assert judging.compute_error_ratio(want[1:], want, unfused, "fp32") == math.inf
    slack = {name: want * (1 + 0.9 * judging.SLACK[name]) for name in judging.SLACK}
    assert all(
        judging.compute_error_ratio(got, want, want, name) < 1 for name, got in slack.items()
    )
    assert judging.compute_error_ratio(slack["fp16"], want, want, "bf16+fp32") < 1
    assert judging.compute_error_ratio(slack["bf16"], want, want, "fp16+fp32") > 1


def test_fill_empty_with_nan_fills_allocated_tensors():
    with judging.fill_empty_with_nan():
        assert torch.empty(3).isnan().all()
        assert torch.ones(2, dtype=torch.bfloat16).new_empty(3).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_list_cases_covers_layouts_dropout_and_biases():
    full, quick = (
        formula.list_cases(quick=False, gpu=True),
        formula.list_cases(quick=True, gpu=False),
    )
    assert len(full) > len(formula.list_cases(quick=False, gpu=False)) > len(quick)
    for cases in (full, quick):
        assert {case.layout for case in cases} == {"plain", "strided", "misaligned"}
        plain = [case for case in cases if case.layout == "plain"]
        assert {bool(case.dropout) for case in plain if case.weight} == {True, False}
        assert any(case.biases for case in cases)
        assert any(not case.weight for case in cases)
        # Without dropout, and aligned: the rank step last, through tensor descriptors.
        assert any(case.K % 8 == case.N % 8 == 0 for case in plain if not case.dropout)
    assert max(case.R for case in full) > 128
