"""Suite model fails the gate for wrong models and does not time them."""

import dataclasses
import sys
from functools import partial

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("peft", reason="PEFT is not installed")

from benchmarks.harness import gate, measurement
from benchmarks.harness.case import Case, Ceilings
from benchmarks.peers import virtual
from benchmarks.suites import llama, models
from benchmarks.suites.generate import Generate, _prepare, _prepare_one
from benchmarks.suites.model import Train, _prepare_step
from tests.benchmarks import virtual_tuning
from tests.support import oracle

SEEN = Ceilings(1e10, {"fp32": 1e11, "bf16": 1e11})
SIZES = {"H": 64, "I": 96, "layers": 2, "R": 4}


def train(dtype: str = "fp32", **options) -> Case:
    lora = "" if dtype == "fp32" else "fp32"
    return Case(Train(), "cpu", dtype, {"B": 2, "L": 12, **SIZES}, lora_dtype=lora, **options)


def generate(S: int, dtype: str = "fp32") -> Case:
    shape = {"B": 4, "L": 5, "new": 3, **SIZES, "S": S}
    return Case(Generate(one=S == 1), "cpu", dtype, shape)


def statuses(case: Case, **providers) -> dict[str, str]:
    case.work.providers |= providers
    return {name: verdict.status for name, verdict in gate.check(case, seed=3).items()}


def expected_statuses(case: Case) -> dict[str, str]:
    """All are ok, but for what the installed transformers loses of PEFT's."""
    lost = {f"peft-{kind}" for kind in ("prefix", "prompt") if virtual.explain_loss(kind)}
    return {name: "absent" if name in lost else "ok" for name in case.providers}


def build_changed(build, name: str, change):
    """The builder's model of operands of which this one was changed in place."""

    def built(case, o):
        change(o[name])
        return build(case, o)

    return built


SOME = "model.layers.1.mlp.up_proj.lora_"
CHANGES = {
    "lora_B is 1.01 times what it is": (f"{SOME}B", lambda t: t.mul_(1.01)),
    "lora_A has a wrong row": (f"{SOME}A", lambda t: t[0, 1].zero_()),
    "an adapter is missing": (f"{SOME}B", lambda t: t.zero_()),
    "a norm of the base is off": ("model.norm.weight", lambda t: t.mul_(1.001)),
}


@pytest.mark.parametrize("how", CHANGES)
def test_gate_fails_wrong_model_in_train_and_generate(how):
    name, change = CHANGES[how]
    wrong = partial(_prepare_step, build_changed(models.build_fastlora, name, change))
    assert statuses(train(), wrong=wrong) == dict.fromkeys(train().providers, "ok") | {
        "wrong": "failed"
    }
    wrong = _prepare_one(build_changed(models.build_lean, name, change))
    found = statuses(generate(1), wrong=wrong)
    assert found.pop("wrong") == "failed"
    assert found == expected_statuses(generate(1))


@pytest.mark.parametrize("name", ["dx", f"{SOME}A", f"{SOME}B", "loss"])
def test_gate_checks_every_gradient(name):
    def wrong(case, o):
        call = case.work.providers["fastlora"](case, o)
        return lambda: {k: t * 1.001 if k == name else t for k, t in call().items()}

    verdict = gate.check(with_wrong(train(), wrong), seed=3)["wrong"]
    assert verdict.status == "failed"
    key = {f"{SOME}A": "dA.1", f"{SOME}B": "dB.1"}.get(name, name)
    over = [k for k, (error, bound) in verdict.errors.items() if error > bound]
    assert set(over) <= {key, f"{key}, all of it"}
    assert key in over


def with_wrong(case: Case, wrong) -> Case:
    case.work.providers |= {"wrong": wrong}
    return case


def serve_rows(names: list[str]):
    """fastlora's server with these rows' adapters."""

    def build(case, o):
        return _prepare(models.build_server(case, o, range(3)), case, o, adapter_names=names)

    return build


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_gate_checks_adapter_of_every_row(dtype):
    """Row i has adapter i modulo 3."""
    right, swapped, none = ["0", "1", "2", "0"], ["1", "0", "2", "0"], ["0", "1", "2", "__base__"]
    found = statuses(
        generate(3, dtype),
        right=serve_rows(right),
        swapped=serve_rows(swapped),
        none=serve_rows(none),
    )
    assert found.pop("swapped") == found.pop("none") == "failed"
    assert set(found.values()) == {"ok"}


def test_prefix_and_prompt_tuning_have_separate_references(monkeypatch):
    virtual_tuning.keep_virtual_tokens(monkeypatch)

    def ignored(case, o):
        return case.work.providers["base"](case, o)

    def other(kind):
        def build(case, o):
            o[kind] = o[kind] * 0.99
            return _prepare_one(partial(models.build_peft_virtual, kind=kind))(case, o)

        return build

    for kind in ("prefix", "prompt"):
        for wrong in (ignored, other(kind)):
            case = generate(1)
            case.work.providers[f"peft-{kind}"] = wrong
            verdicts = gate.check(case, seed=3)
            assert verdicts.pop(f"peft-{kind}").status == "failed"
            assert {verdict.status for verdict in verdicts.values()} == {"ok"}
    assert statuses(generate(1), merged=ignored)["merged"] == "failed"


def test_gate_fails_logits_of_another_step():
    def late(case, o):
        call = case.work.providers["fastlora"](case, o)
        return lambda: {"logits": call()["logits"].roll(1, 1)}

    assert statuses(generate(3), late=late)["late"] == "failed"


@pytest.mark.usefixtures("few_copies")
def test_failed_model_provider_is_not_timed():
    case = generate(3)
    wrong = build_changed(
        lambda case, o: models.build_lean_many(case, o, [0, 1, 2, 0]),
        *CHANGES["an adapter is missing"],
    )
    case.work.providers = {
        "base": case.work.providers["base"],
        "torch": _prepare_one(lambda case, o: models.build_lean_many(case, o, [0, 1, 2, 0])),
        "wrong": _prepare_one(wrong),
    }
    lines = {line["provider"]: line for line in measurement.measure(case, SEEN, seconds=0.02)}
    assert {name for name, line in lines.items() if "ms" in line} == {"base", "torch"}
    assert lines["wrong"]["status"] == "failed"
    assert lines["torch"]["peak_bytes"] > 0


def test_gate_compares_dropout_case_without_dropout():
    case = train(dropout=0.5)
    assert set(statuses(case).values()) == {"ok"}
    # What is timed drops.
    call = case.providers["fastlora"](case, case.work.operands(case, 0))
    assert not torch.equal(call()["dx"], call()["dx"])


def test_adapters_change_expected_results_of_models():
    for case in (train(), generate(3)):
        o = case.work.operands(case, 0)
        with_them, without = (case.work.expected(case, o, name) for name in ("peft", "base"))
        for name, value in without.items():
            if name != "loss":
                assert oracle.relative_error(with_them[name], value) > 0.3


def test_models_share_operands_of_one_provider_only():
    case = generate(1)
    o, again, other = (case.work.operands(case, seed) for seed in (0, 0, 1))
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(o[name], again[name])
    assert not torch.equal(o[name], other[name])
    assert o[name].data_ptr() != again[name].data_ptr()
    assert llama.build_model(case, o).get_parameter(name).data_ptr() == o[name].data_ptr()
    layer = models.build_peft(case, o).base_model.model.get_submodule(SOME.removesuffix(".lora_"))
    assert layer.lora_A["0"].weight.data_ptr() == o[f"{SOME}A"].data_ptr()


def test_model_case_groups_heads_like_llama_3(monkeypatch):
    """From H = 1024 on: keys, values and the prefix are a quarter as wide."""
    virtual_tuning.keep_virtual_tokens(monkeypatch)
    shape = {"B": 2, "L": 4, "new": 2, "H": 1024, "I": 64, "layers": 1, "R": 4, "S": 1}
    case = Case(Generate(one=True), "cpu", "fp32", shape)
    assert llama.count_heads(case) == (8, 2, 128)
    assert set(statuses(case).values()) == {"ok"}


@pytest.mark.full  # tests/benchmarks/test_compiling.py compiles single layers
def test_compiled_models_pass_the_same_gate(monkeypatch):
    # Which code the compiler writes is its own affair, and takes a minute.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    found = statuses(train(compiled=True))
    assert {name: found[name] for name in found if "compiled" in name} == {
        "base-compiled": "ok",
        "peft-compiled": "ok",
        "fastlora-compiled": "ok",
    }


def test_compiled_models_are_absent_without_compiler(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    found = statuses(train(compiled=True))
    assert {found[name] for name in found if "compiled" in name} == {"absent"}
    assert {found[name] for name in found if "compiled" not in name} == {"ok"}


@pytest.mark.parametrize("case", [train(compiled=True), generate(1), generate(3)])
def test_model_providers_are_absent_without_transformers(monkeypatch, case):
    monkeypatch.setitem(sys.modules, "transformers", None)
    lines = list(measurement.measure(case, SEEN))
    assert [line["provider"] for line in lines] == list(case.providers)
    assert {line["status"] for line in lines} == {"absent"}
    assert all(line["reason"].startswith("transformers cannot be imported") for line in lines)


def test_other_model_providers_run_without_peft(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    virtual_tuning.forget_explanations(monkeypatch)
    found = statuses(generate(1))
    assert found == {name: "absent" if "peft" in name else "ok" for name in found}


def test_model_cost_follows_its_formula():
    B, L, H, I, layers, R = 2, 12, 64, 96, 2, 4  # noqa: E741
    case = train()
    of_block = [(H, H)] * 4 + [(I, H)] * 2 + [(H, I)]
    weights = layers * sum(N * K for N, K in of_block) + 256 * H
    factors = layers * R * sum(N + K for N, K in of_block)
    attention = layers * 2 * B * L * L * H
    flops, moved = case.work.cost(case, "base-compiled")
    assert flops == 4 * B * L * weights + 3 * attention
    assert case.work.cost(case, "peft-patched")[0] == flops + 6 * B * L * factors
    assert moved > 2 * 4 * weights

    case, new, S = generate(3), 3, 3
    base, ours = (case.work.cost(case, name) for name in ("base", "fastlora"))
    rows = 4 * (5 + new - 1)
    assert ours[0] - base[0] == 2 * rows * factors
    assert ours[1] - base[1] == 4 * new * S * factors
    single = generate(1)
    costs = {name: single.work.cost(single, name) for name in single.providers}
    assert costs["merged"] == costs["peft-merged"] == costs["base"]
    assert costs["peft-prompt"] > costs["peft-prefix"] > costs["base"]
    two = dataclasses.replace(single, shape={**single.shape, "new": 2})
    assert two.work.cost(two, "base") < costs["base"]
