"""Suite overhead holds modules and compiled modules to the oracle."""

import time

import pytest
import torch

from benchmarks import cases
from benchmarks.harness import gate, measurement
from benchmarks.harness.case import Case, Ceilings
from benchmarks.suites.overhead import Overhead, OverheadMulti

SEEN = Ceilings(1e10, {"fp32": 1e11})
SMALL = {"K": 64, "N": 64, "R": 8}


def works() -> list[Case]:
    return [
        *(
            Case(Overhead(backward=backward), "cpu", "fp32", {"M": 1, **SMALL}, compiled=True)
            for backward in (False, True)
        ),
        Case(
            OverheadMulti(),
            "cpu",
            "fp32",
            {"T": 4, **SMALL, "S": 4},
            workload="distinct",
            compiled=True,
        ),
    ]


@pytest.mark.parametrize("case", works(), ids=lambda case: case.work.name)
def test_overhead_gate_passes_right_and_fails_wrong(case, monkeypatch):
    eager = torch.compile
    # Which code the compiler writes is its own affair, and takes its time.
    monkeypatch.setattr(torch, "compile", lambda module: eager(module, backend="aot_eager"))
    right = case.work.providers["fastlora"]

    def wrong(case, o):
        o["lora_B"] = (o["lora_B"].detach() * 1.01).requires_grad_(o["lora_B"].requires_grad)
        return right(case, o)

    case.work.providers["wrong"] = wrong
    verdicts = gate.check(case, measurement.SEED)
    assert verdicts.pop("wrong").status == "failed"
    for provider, verdict in verdicts.items():
        allowed = ("ok", "absent") if provider.startswith("peft") else ("ok",)
        assert verdict.status in allowed, (provider, verdict.reason)
    assert {"base-compiled", "peft-compiled", "fastlora-compiled"} < verdicts.keys()


def test_overhead_gate_passes_code_of_inductor():
    case, *_ = works()
    case.work.providers = {"torch": case.work.providers["torch"]}
    case.work.compiled_providers = {
        "fastlora-compiled": case.work.compiled_providers["fastlora-compiled"]
    }
    verdicts = gate.check(case, measurement.SEED)
    assert {verdict.status for verdict in verdicts.values()} <= {"ok", "absent"}
    assert verdicts["torch"].status == "ok"


def test_overhead_divides_time_by_number_of_calls():
    case, *_ = works()
    o = case.work.operands(case, 0)
    y = case.work.providers["torch"](case, o)()

    def slow(case, o):
        return lambda: time.sleep(0.001) or y

    case.work.providers = {k: case.work.providers[k] for k in ("base", "torch")} | {"slow": slow}
    case.work.compiled_providers = {}
    lines = {line["provider"]: line for line in measurement.measure(case, SEEN, seconds=0.02)}
    assert lines["slow"]["calls"] == 50
    assert 1 <= lines["slow"]["ms"]["p50"] < 20
    assert lines["slow"]["copies"] == 3


def test_overhead_requires_gradients_only_in_training():
    forward, training, many = works()
    assert (
        forward.providers["fastlora"](forward, forward.work.operands(forward, 0))()["y"].grad_fn
        is None
    )
    outputs = training.providers["fastlora"](training, training.work.operands(training, 0))()
    assert outputs.keys() == {"y", "dx", "dA", "dB"}
    assert many.providers["fastlora"](many, many.work.operands(many, 0))()["y"].grad_fn is None


def test_overhead_cases_have_same_shapes_on_devices():
    on_cpu, on_cuda = (cases.select(device, suite="overhead") for device in ("cpu", "cuda"))
    assert [case.shape for case in on_cpu] == [case.shape for case in on_cuda]
    assert all(case.work.host_only for case in (*on_cpu, *on_cuda))
