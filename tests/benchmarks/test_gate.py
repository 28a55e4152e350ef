"""The gate finds providers that disagree with float64, and no others."""

import dataclasses

import pytest
import torch
from torch.nn import functional as nnf

from benchmarks import cases
from benchmarks.harness import gate, measurement
from benchmarks.harness.case import Absent, Case
from benchmarks.harness.oracle import compute_gradients
from benchmarks.suites import linear, multi
from benchmarks.suites.linear import Linear, LinearAdd
from benchmarks.suites.merge import Merge, Swap
from benchmarks.suites.multi import Multi
from tests.benchmarks.small_case import SIZES, correct_output, linear_case, lines_of
from tests.support import oracle

WRONG = {
    "adapter ignored": lambda o: nnf.linear(o["x"], o["weight"]),
    "a little off": lambda o: correct_output(o) * (1 + 1e-5),
    "one row wrong": lambda o: correct_output(o).index_fill_(0, torch.tensor([8]), 0.0),
    "not a number": lambda o: correct_output(o).mul_(float("nan")),
    "half precision": lambda o: correct_output(o).half(),
}


@pytest.mark.parametrize("how", WRONG)
def test_gate_fails_wrong_provider_before_timing(how):
    calls = []

    def build(case, o):
        return lambda: calls.append(1) or {"y": WRONG[how](o)}

    found = lines_of(linear_case(wrong=build))
    assert found["wrong"]["status"] == "failed"
    assert "y: error" in found["wrong"]["reason"]
    assert "ms" not in found["wrong"]
    assert len(calls) == 1
    assert all(
        found[name]["status"] == "ok" and "ms" in found[name] for name in ("base", "fastlora")
    )


def test_gate_checks_rows_outside_the_sample():
    """Of 32 rows seven are held to float64; all of them to unfused torch."""
    work = Multi("decode")
    sizes = {"T": 32, "K": 40, "N": 56, "R": 4, "S": 32}
    case = Case(work, "cpu", "fp32", sizes, workload="distinct")
    right_call = work.providers["fastlora"]

    def build(case, o):
        call = right_call(case, o)
        return lambda: {"y": call()["y"].index_fill(0, torch.tensor([1, 2, 3]), 0.5)}

    work.providers = {**work.providers, "wrong": build}
    verdicts = gate.check(case, seed=1)
    assert verdicts["fastlora"].status == "ok"
    assert verdicts["wrong"].status == "failed"
    assert verdicts["wrong"].reason.startswith("y, all of it")


@pytest.mark.parametrize("share", [0.0, 0.95, 2.0])
def test_gate_finds_wrong_share_added_to_given_output(share):
    work = LinearAdd()
    build = work.providers["fastlora"]
    work.providers["wrong"] = lambda case, o: build(case, {**o, "lora_B": o["lora_B"] * share})
    verdicts = gate.check(Case(work, "cpu", "bf16", {"M": 9, **SIZES}), seed=1)
    assert (verdicts["fastlora"].status, verdicts["wrong"].status) == ("ok", "failed")


@pytest.mark.parametrize("work", [Merge(unmerge=False), Swap()])
def test_gate_finds_slightly_weakened_merge(work):
    case = Case(work, "cpu", "bf16", {"K": 64, "N": 48, "R": 8})
    build = work.providers["fastlora"]
    weaker = {"lora_B": 0.95, "other_B": 0.95}
    work.providers = {
        **work.providers,
        "weak": lambda case, o: build(case, {k: t * weaker.get(k, 1) for k, t in o.items()}),
    }
    verdicts = gate.check(case, seed=1)
    assert (verdicts["fastlora"].status, verdicts["weak"].status) == ("ok", "failed")


def test_gate_reports_raising_provider_as_error():
    def raises(case, o):
        raise RuntimeError("no kernel image")

    found = lines_of(
        linear_case(raises=raises, flat=lambda case, o: lambda: {"y": correct_output(o)[0]})
    )
    assert found["raises"]["reason"] == "RuntimeError: no kernel image"
    assert found["raises"]["status"] == found["flat"]["status"] == "error"
    assert "ms" not in found["flat"]


def test_nothing_is_timed_when_unfused_torch_fails():
    case = linear_case(torch=lambda case, o: lambda: {"y": correct_output(o) * 1.1})
    found = lines_of(case)
    assert {line["status"] for line in found.values()} == {"failed", "error"}
    assert not any("ms" in line for line in found.values())


def test_gate_reports_absent_provider_with_reason():
    def absent(case, o):
        raise Absent("not installed")

    line = lines_of(linear_case(peer=absent))["peer"]
    assert (line["status"], line["reason"]) == ("absent", "not installed")


# When tiny, many are the same.
TINY = {
    case.name: case
    for case in (
        dataclasses.replace(c, device="cpu", compiled=False).tiny()
        for c in (*cases.CPU, *cases.CUDA)
    )
}


@pytest.mark.parametrize("name", TINY)
def test_every_registered_case_passes_gate_when_tiny(name):
    if TINY[name].suite == "model":
        pytest.importorskip("transformers", reason="transformers is not installed")
    verdicts = gate.check(TINY[name], seed=1)
    assert verdicts.keys() >= {"base", "torch", "peft", "fastlora"}
    for provider, verdict in verdicts.items():
        allowed = ("ok", "absent") if "peft" in provider else ("ok",)
        assert verdict.status in allowed, (provider, verdict.reason)


def test_cuda_kernel_providers_pass_the_gate(on_cuda_kernels):
    """On a GPU; here they run on the host, and are held to the same gate, or say why not."""
    from benchmarks.suites import linear, merge, multi

    def verdict(case: Case) -> str:
        case.work.providers |= {"cuda": case.work.gpu_providers["cuda"]}
        return gate.check(case, measurement.SEED)["cuda"].status

    case = dataclasses.replace(linear_case(), dtype="bf16")
    shapes = {"M": 8, "K": 64, "N": 48, "R": 8}
    for backward in (False, True):
        work = linear.Linear(backward=backward)
        assert verdict(dataclasses.replace(case, work=work, shape=shapes)) == "ok"
    odd = dataclasses.replace(case, work=linear.Linear(backward=False), shape=shapes | {"K": 63})
    assert verdict(odd) == "absent"
    swapped = {"N": 72, "K": 64, "R": 8}
    assert verdict(dataclasses.replace(case, work=merge.Swap(), shape=swapped)) == "ok"
    assert "cuda" in multi.Multi("decode").gpu_providers


def test_triton_path_providers_pass_the_gate(monkeypatch):
    """On a GPU; here they are interpreted, and held to the same gate."""
    pytest.importorskip("triton", reason="triton is not installed")
    from fastlora.kernels.choose.ledger import MULTI_PATHS, PATHS

    def held(case: Case, paths: tuple[str, ...]) -> None:
        assert set(paths).isdisjoint(case.providers)
        assert set(paths) <= set(dataclasses.replace(case, device="cuda").providers)
        case.work.providers |= case.work.gpu_providers
        verdicts = gate.check(case, measurement.SEED)
        for path in paths:
            verdict = verdicts[path]
            # Not every product can take every path, and no other stands in for it.
            assert verdict.status == "ok" or f"cannot run along {path!r}" in verdict.reason
        assert sum(verdicts[path].status == "ok" for path in paths) >= 2

    assert linear.PATHS == PATHS
    assert (*multi.PATHS, "added") == MULTI_PATHS
    for backward in (False, True):
        case = dataclasses.replace(linear_case(), work=Linear(backward=backward), dropout=0.2)
        held(case, PATHS)
    held(dataclasses.replace(linear_case(), work=LinearAdd()), linear.ADD_PATHS)
    sizes = {"T": 9, "K": 24, "N": 40, "R": 12, "S": 3}
    mixed = Case(Multi("decode"), "cpu", "bf16", sizes, workload="distinct", ranks="mixed")
    held(mixed, multi.PATHS)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_compute_gradients_matches_the_oracle(dropout):
    torch.manual_seed(0)
    M, K, N, R = 9, 21, 13, 5
    dy, x, W = torch.randn(M, N), torch.randn(M, K), torch.randn(N, K)
    A, B = torch.randn(R, K), torch.randn(N, R)
    columns, outs = torch.tensor([0, 7, 20]), torch.tensor([3, 12])
    keep, factor = torch.rand(M, K) >= dropout, 1 / (1 - dropout)
    want = oracle.lora_linear_grads(dy, x, W, A, B, -1.5, keep=keep, keep_scale=factor)
    mask = keep.double() * factor if dropout else None
    got = compute_gradients(dy, x, W, A, B, -1.5, mask, columns, outs)
    torch.testing.assert_close(got["dx"], want["x"][:, columns], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got["dA"], want["lora_A"][:, columns], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got["dB"], want["lora_B"][outs], rtol=1e-12, atol=1e-12)
