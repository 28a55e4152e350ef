"""A patched PEFT model gives the numbers of the unpatched one after any change."""

from __future__ import annotations

import copy

import pytest
import torch

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")


import fastlora  # noqa: E402
from tests.support.models import assert_agree, quiet  # noqa: E402
from tests.support.patched import (  # noqa: E402
    KINDS,
    add_second_adapter,
    assert_same,
    config,
    count_forwards,
    fill_adapters,
    inputs,
    pair,
    run,
    train_adapters,
)

pytestmark = quiet


@pytest.mark.parametrize("kind", KINDS)
def test_patched_model_matches_peft_in_forward_and_training(kind, monkeypatch):
    torch.manual_seed(3)  # several steps magnify rounding errors, on some data beyond the bound
    given = inputs(kind)
    plain, patched = pair(kind)
    with count_forwards(monkeypatch) as counts:
        assert_same(
            plain, patched, lambda m: [run(m, given), *train_adapters(m, given), run(m, given)]
        )
    layers = len(fastlora.report(patched).replaced)
    assert counts == {"one": 5 * layers, "many": 0, "peft": 5 * layers}  # PEFT's own model's


OPTIONS = {
    "rslora": {"use_rslora": True},
    "lora_bias": {"lora_bias": True},
    "bias all": {"bias": "all"},
    "bias lora_only": {"bias": "lora_only"},
    "patterns": {"rank_pattern": {"lin0": 3}, "alpha_pattern": {"lin1": 11}},
    "modules_to_save": {"modules_to_save": ["head"]},
    "rank above the sizes": {"r": 40},
    "gaussian": {"init_lora_weights": "gaussian"},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
}


@pytest.mark.parametrize("options", OPTIONS)
def test_patched_model_matches_peft_with_every_option(options, monkeypatch):
    given = inputs("mlp")
    plain, patched = pair("mlp", **OPTIONS[options])
    with count_forwards(monkeypatch) as counts:
        assert_same(
            plain, patched, lambda m: [run(m, given), *train_adapters(m, given), run(m, given)]
        )
    assert counts["one"] == 10


@pytest.mark.parametrize("adapters", [torch.float32, None], ids=["float32 adapters", "the base's"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_patched_model_matches_peft_in_every_dtype(dtype, adapters, monkeypatch):
    given = inputs("mlp", dtype=dtype)
    plain, patched = pair("mlp", dtype, get={"autocast_adapter_dtype": adapters is not None})
    with count_forwards(monkeypatch) as counts, torch.no_grad():
        got, want = run(patched, given), run(plain, given)
    # float64 has no tolerance of its own in tests.support.models.
    wide = dtype == torch.float64
    assert_agree(got.float() if wide else got, want.float() if wide else want)
    assert counts["one"] == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_patched_model_matches_peft_under_autocast(dtype, base, monkeypatch):
    given = inputs("mlp", dtype=base)
    plain, patched = pair("mlp", base)
    with count_forwards(monkeypatch) as counts, torch.autocast("cpu", dtype):
        got, want = run(patched, given), run(plain, given)
    assert_agree(got, want)
    assert counts["one"] == 2
    for out in (got, want):
        out.float().square().sum().backward()
    for (name, p), q in zip(patched.named_parameters(), plain.parameters(), strict=True):
        if q.grad is not None:
            assert p.grad is not None
            assert p.grad.dtype == q.grad.dtype, name
            assert_agree(p.grad.to(dtype), q.grad.to(dtype))


def test_input_gradient_matches_peft_when_backward_repeats():
    plain, patched = pair("mlp")
    x = torch.randn(4, 11)

    def act(model):
        own = x.clone().requires_grad_()
        loss = run(model, {"x": own}).square().sum()
        loss.backward(retain_graph=True)
        once = own.grad.clone()
        loss.backward()
        assert_agree(own.grad, 2 * once)
        return [own.grad]

    assert_same(plain, patched, act)


def test_gradient_checkpointing_matches_peft():
    given = inputs("llama")
    plain, patched = pair("llama")
    without = train_adapters(copy.deepcopy(patched), given)
    for reentrant in (True, False):
        models = copy.deepcopy(plain), copy.deepcopy(patched)
        for model in models:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        assert_same(*models, lambda m: train_adapters(m, given))
        assert_agree(
            train_adapters(models[1], given, steps=1)[0],
            train_adapters(models[0], given, steps=1)[0],
        )
    assert len(without) == 3


def test_adding_choosing_and_deleting_adapters_matches_peft():
    given = inputs("mlp")

    def act(model):
        found = [run(add_second_adapter(model), given)]
        model.set_adapter("other")
        found += [run(model, given), *train_adapters(model, given)]
        model.base_model.set_adapter(["default", "other"])
        found += [run(model, given), *train_adapters(model, given)]
        model.delete_adapter("default")
        return [*found, run(model, given)]

    plain, patched = pair("mlp")
    assert_same(plain, patched, act)
    assert fastlora.report(patched).replaced.keys() == {
        "base_model.model.lin0",
        "base_model.model.lin1",
        "base_model.model.head",
    }


def test_layer_without_active_adapter_matches_peft():
    plain, patched = pair("mlp", target_modules=["lin0"])
    for model in (plain, patched):
        model.add_adapter("other", config("mlp", target_modules=["lin1"]))
        fill_adapters(model).set_adapter("other")
    assert_same(plain, patched, lambda m: [run(m, {"x": torch.ones(3, 11)})])


def test_disable_adapter_matches_peft():
    given = inputs("llama")

    def act(model):
        found = [run(model, given)]
        with model.disable_adapter():
            found.append(run(model, given))
        return [*found, run(model, given)]

    assert_same(*pair("llama"), act)


def test_merging_and_unmerging_matches_peft():
    given = inputs("mlp")

    def act(model):
        add_second_adapter(model)
        model.base_model.set_adapter(["default", "other"])
        model.merge_adapter()
        found = [run(model, given)]
        model.unmerge_adapter()
        found.append(run(model, given))
        model.merge_adapter(["other"])
        with model.disable_adapter():
            found.append(run(model, given))
        return [*found, run(model, given)]

    assert_same(*pair("mlp"), act)
