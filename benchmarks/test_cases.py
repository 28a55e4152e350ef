"""The list of cases through pytest-benchmark: ``pytest benchmarks/``.

For its statistics, comparisons and histograms. It times one provider after the other, on warm
operands; ratios to be trusted come from ``fastlora bench``, which lets them take turns.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch

from benchmarks import cases
from benchmarks.harness import gate
from benchmarks.harness.case import Case
from benchmarks.harness.measurement import SEED

pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed")

_CASES = [*cases.CPU, *(cases.CUDA if torch.cuda.is_available() else ())]


@cache
def _verdicts(number: int) -> dict[str, gate.Verdict]:
    return gate.check(_CASES[number], SEED)


@pytest.mark.parametrize(
    "number, provider",
    [
        pytest.param(number, provider, id=f"{case.device}-{case.name}-{provider}")
        for number, case in enumerate(_CASES)
        for provider in case.providers
    ],
)
def test_case(benchmark, number: int, provider: str) -> None:
    case, verdict = _CASES[number], _verdicts(number)[provider]
    if verdict.status == "absent":
        pytest.skip(verdict.reason)
    assert verdict.status == "ok", verdict.reason
    benchmark.group = f"{case.device} {case.name}"
    benchmark.extra_info.update(shape=dict(case.shape), dtype=case.dtype, provider=provider)
    benchmark(_synchronized(case, provider))


def _synchronized(case: Case, provider: str):
    call = case.providers[provider](case, case.work.operands(case, SEED))
    if case.device == "cpu" or case.work.host_only:
        return call

    def call_and_wait() -> None:
        call()
        torch.cuda.synchronize()

    return call_and_wait
