"""patch_peft patches plain layers, leaves others with a reason, and matches PEFT."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.modules import module as every_module

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

from peft.tuners.lora import layer as lora  # noqa: E402

import fastlora  # noqa: E402
from tests.support.models import llama, quiet, tokens, untouched  # noqa: E402
from tests.support.patched import (  # noqa: E402
    Doubling,
    assert_same,
    config,
    count_forwards,
    fill_adapters,
    inputs_of_ones,
    pair,
    peft_model,
    run,
)
from tests.support.readers import Handing, count_watch_hooks, wavlm  # noqa: E402

pytestmark = quiet
LIN0, LIN1 = "base_model.model.lin0", "base_model.model.lin1"


def test_patch_peft_reports_replaced_and_merged_layers():
    model = peft_model("mlp", rank_pattern={"lin1": 3})
    found = fastlora.patch_peft(model)
    assert found == fastlora.report(model)
    assert found.replaced == {LIN0: 5, LIN1: 3}
    assert (found.skipped, found.around, found.merged) == ({}, {}, ())
    assert found.trainable == 5 * (11 + 20) + 3 * (20 + 13)
    assert "2 layers replaced (r=3, r=5)" in str(found)
    model.merge_adapter()
    assert fastlora.report(model).merged == (LIN0, LIN1)
    assert fastlora.patch_peft(model) == fastlora.report(model)  # once more changes nothing


def hooked(model):
    model.lin0.base_layer.register_forward_hook(lambda *_: None)
    return "its base_layer has hooks"


def hooked_backward(model):
    model.lin0.lora_A["default"].register_full_backward_hook(lambda *_: None)
    return "lora_A of adapter 'default' has hooks"


def hooked_before(model):
    model.lin0.lora_B["default"].register_forward_pre_hook(lambda *_: None)
    return "lora_B of adapter 'default' has hooks"


def hooked_dropout(model):
    model.lin0.lora_dropout["default"].register_forward_hook(lambda *_: None)
    return "lora_dropout of adapter 'default' has hooks"


def other_dropout(model):
    model.lin0.lora_dropout["default"] = nn.AlphaDropout(0.1)
    return "lora_dropout of adapter 'default' is a torch.nn.modules.dropout.AlphaDropout"


def other_part(model):
    model.lin0.lora_A["default"] = Doubling(11, 5, bias=False)
    return f"lora_A of adapter 'default' is a {Doubling.__module__}.Doubling"


def offloaded(model):
    base = model.lin0.base_layer
    base.forward = lambda x, _forward=base.forward: _forward(x) + 1
    return "its base_layer has a forward of its own"


def replaced(model):
    layer = model.lin0
    layer.forward = lambda x, _forward=layer.forward: _forward(x) + 1
    return "its forward was replaced on the instance"


def dora(model):
    other = peft_model("mlp", use_dora=True, target_modules=["lin0"])
    model.lin0 = other.base_model.model.lin0
    return "adapter 'default' is a DoraLinearVariant"


def sharded_away(model):
    base = model.lin0.base_layer
    base.full, base.weight.data = base.weight.data, torch.empty(0)
    base.register_forward_pre_hook(gathered)
    base.register_forward_hook(released)
    return "its base_layer has hooks"


def gathered(base, _):
    base.weight.data = base.full


def released(base, *_):
    base.weight.data = torch.empty(0)


def weight_norm(model):
    torch.nn.utils.weight_norm(model.lin0.base_layer)
    return "its base_layer has hooks"


OBSTACLES = [
    hooked,
    hooked_backward,
    hooked_before,
    hooked_dropout,
    other_dropout,
    other_part,
    offloaded,
    replaced,
    dora,
    sharded_away,
    pytest.param(weight_norm, marks=pytest.mark.filterwarnings("ignore:.*weight_norm")),
]


@pytest.mark.parametrize("odd", OBSTACLES)
def test_patch_peft_leaves_unusual_layers_to_peft(odd):
    plain, patched = peft_model("mlp"), peft_model("mlp")
    for model in (plain, patched):
        reason = odd(model.base_model.model)
        fill_adapters(model).eval()
    with untouched(patched), pytest.raises(ValueError, match="1 of 2 LoRA layers cannot") as error:
        fastlora.patch_peft(patched, strict=True)
    assert f"{LIN0}: {reason}" in str(error.value)
    found = fastlora.patch_peft(patched)
    assert found.skipped == {LIN0: reason}
    assert found.replaced == {LIN1: 5}
    assert type(patched.base_model.model.lin0) is lora.Linear
    assert_same(plain, patched, lambda m: [run(m, inputs_of_ones())])


@pytest.mark.parametrize("odd", [hooked, hooked_before, other_part, offloaded, dora])
def test_patched_layer_falls_back_when_changed_later(odd, monkeypatch):
    plain, patched = pair("mlp")
    for model in (plain, patched):
        reason = odd(model.base_model.model)
        fill_adapters(model).eval()
    if odd is dora:
        patched.base_model.model.lin0.__class__ = type(patched.base_model.model.lin1)
    with count_forwards(monkeypatch) as counts:
        assert_same(plain, patched, lambda m: [run(m, inputs_of_ones())])
    assert counts == {"one": 1, "many": 0, "peft": 3}
    assert fastlora.report(patched).skipped == {LIN0: reason}


def test_inactive_dora_adapter_does_not_prevent_patching(monkeypatch):
    plain, patched = peft_model("mlp"), peft_model("mlp")
    for model in (plain, patched):
        model.add_adapter("dora", config("mlp", use_dora=True))
        fill_adapters(model).eval()
    assert fastlora.patch_peft(patched, strict=True).replaced == {LIN0: 5, LIN1: 5}
    with count_forwards(monkeypatch) as counts:
        assert_same(plain, patched, lambda m: [run(m, inputs_of_ones())])
        assert counts["one"] == 2
        for model in (plain, patched):
            model.set_adapter("dora")
        assert_same(plain, patched, lambda m: [run(m, inputs_of_ones())])
        assert counts["one"] == 2
    reason = "adapter 'dora' is a DoraLinearVariant"
    assert fastlora.report(patched).skipped == {LIN0: reason, LIN1: reason}


def test_hooks_of_layer_parts_are_called():
    called = []
    for where in ("base_layer", "lora_A", "lora_B", "lora_dropout"):
        patched = pair("mlp")[1]
        part = getattr(patched.base_model.model.lin0, where)
        part = part if where == "base_layer" else part["default"]
        part.register_forward_hook(lambda *_, where=where: called.append(where))
        run(patched, inputs_of_ones())
    assert called == ["base_layer", "lora_A", "lora_B", "lora_dropout"]


def test_global_module_hooks_are_called(monkeypatch):
    patched = pair("mlp")[1]
    called = []
    with count_forwards(monkeypatch) as counts:
        handle = every_module.register_module_forward_hook(lambda m, *_: called.append(m))
        try:
            run(patched, inputs_of_ones())
        finally:
            handle.remove()
    assert patched.base_model.model.lin0.lora_A["default"] in called
    assert counts["one"] == 0


def test_hooks_of_patched_layer_keep_fast_path(monkeypatch):
    patched = pair("mlp")[1]
    called = []
    patched.base_model.model.lin0.register_forward_hook(lambda *_: called.append(1))
    with count_forwards(monkeypatch) as counts:
        run(patched, inputs_of_ones())
    assert (called, counts["one"]) == ([1], 2)


def in_peft(model, *targets):
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=list(targets)))


def test_patch_peft_warns_of_layers_never_called():
    model = in_peft(wavlm(), "q_proj", "v_proj", "intermediate_dense")
    says = r"PEFT's adapters of these layers are not what .*q_proj and 3 more: WavLMAttention\."
    with untouched(model), pytest.raises(ValueError, match="4 of 6 LoRA layers cannot be patched"):
        fastlora.patch_peft(model, strict=True)
    with pytest.warns(UserWarning, match=says.replace("q_proj", "[qv]_proj")):
        found = fastlora.patch_peft(model)
    assert {name.rpartition(".")[2] for name in found.replaced} == {"intermediate_dense"}
    assert {name.rpartition(".")[2] for name in found.skipped} == {"q_proj", "v_proj"}
    with pytest.raises(ValueError, match=r"4 of 4 LoRA layers cannot .* never calls it"):
        fastlora.patch_peft(in_peft(wavlm(), "q_proj", "v_proj"))


def test_never_called_layers_merge_only_without_effect():
    model = in_peft(wavlm(), "q_proj", "intermediate_dense")
    with pytest.warns(UserWarning, match="not what the model computes with"):
        fastlora.patch_peft(model)
    model.merge_adapter()
    model.unmerge_adapter()
    fill_adapters(model)
    says = r"attention\.q_proj: WavLMAttention.*never calls it, so its adapter has had no part"
    for merge in (model.merge_adapter, model.merge_and_unload):
        with untouched(model), pytest.raises(RuntimeError, match=says):
            merge()
    model.unload()


def test_first_forward_warns_of_bypassed_layers():
    torch.compiler.reset()  # beside graphs hooks stay
    model, x = in_peft(Handing(), "inner", "called", "unused"), torch.randn(2, 4)
    fastlora.patch_peft(model)
    with pytest.warns(UserWarning, match=r"was read: inner \(by the model, a Handing\)\. What"):
        model(x)
    assert fastlora.report(model).bypassed == {"base_model.model.inner": "Handing"}
    assert count_watch_hooks(model) == 0
    with pytest.raises(RuntimeError, match="inner: Handing reads its weight, so its adapter"):
        fill_adapters(model).merge_adapter()
    model.add_adapter("other", peft.LoraConfig(r=3, target_modules=["inner"]))
    assert count_watch_hooks(model) > 0
    fastlora.unpatch_peft(model)
    assert count_watch_hooks(model) == 0


def test_generate_stops_watching_for_bypassed_layers(recwarn):
    torch.compiler.reset()
    model = in_peft(llama(), "q_proj", "up_proj")
    fastlora.patch_peft(model)
    model.generate(input_ids=tokens(1, 3), max_new_tokens=2)
    assert count_watch_hooks(model) == 0
    assert not [w for w in recwarn if "never called" in str(w.message)]
