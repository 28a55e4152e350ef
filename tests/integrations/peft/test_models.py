"""patch_peft on models of every kind, and fastlora's functions called with PEFT models."""

from __future__ import annotations

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")


import fastlora  # noqa: E402
from tests.support.models import assert_agree, llama, quiet, untouched  # noqa: E402
from tests.support.patched import (  # noqa: E402
    Mlp,
    added_by_transformers,
    assert_same,
    config,
    fill_adapters,
    inject_adapter,
    inputs_of_tokens,
    peft_model,
    run,
)

pytestmark = quiet
LIN0, LIN1 = "base_model.model.lin0", "base_model.model.lin1"


def test_patch_peft_leaves_embeddings_to_peft():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.lin = nn.Embedding(9, 8), nn.Linear(8, 6)

        def forward(self, x):
            return self.lin(self.words(x))

    settings = peft.LoraConfig(r=2, target_modules=["words", "lin"])
    model = fill_adapters(peft.get_peft_model(Model(), settings))
    x = torch.tensor([[1, 2], [3, 4]])
    want = model(x)
    found = fastlora.patch_peft(model)
    assert found.replaced == {"base_model.model.lin": 2}
    reason = "it is a peft.tuners.lora.layer.Embedding, not a peft.tuners.lora.Linear"
    assert found.skipped == {"base_model.model.words": reason}
    assert_agree(model(x), want)


def test_patch_peft_leaves_multihead_attention_to_peft():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.lin = nn.MultiheadAttention(8, 2), nn.Linear(8, 8)

        def forward(self, x):
            return self.attention(x, x, x)[0] + self.lin(x)

    settings = peft.LoraConfig(r=2, target_modules=["attention", "lin"])
    model = fill_adapters(peft.get_peft_model(Model(), settings))
    x = torch.randn(3, 1, 8)
    want = model(x)
    found = fastlora.patch_peft(model)
    assert found.replaced == {"base_model.model.lin": 2}
    assert len(found.skipped) == 2
    assert "never calls it" in found.skipped["base_model.model.attention.base_layer.out_proj"]
    assert_agree(model(x), want)


def test_patch_peft_refuses_models_without_patchable_layers():
    with pytest.raises(ValueError, match=r"found none in Mlp: patch what .*get_peft_model"):
        fastlora.patch_peft(Mlp())
    with pytest.raises(TypeError, match=r"peft_model: expected a torch\.nn\.Module, got str"):
        fastlora.patch_peft("model")
    own = fastlora.replace_linear(Mlp(), fastlora.LoRAConfig(target_modules=["lin0"]))
    with pytest.raises(ValueError, match="found none in Mlp"):
        fastlora.patch_peft(own)
    model = peft_model("mlp", use_dora=True)
    with untouched(model), pytest.raises(ValueError, match="2 of 2 LoRA layers cannot") as caught:
        fastlora.patch_peft(model)
    assert "lin0 and 1 more: adapter 'default' is a Dora" in str(caught.value)


TAKES_A_BASE = {
    "replace_linear": lambda m, d: fastlora.replace_linear(
        m, fastlora.LoRAConfig(target_modules="all-linear")
    ),
    "load_adapter": fastlora.load_adapter,
    "MultiLoRAModel": lambda m, d: fastlora.MultiLoRAModel(m),
}


@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("call", TAKES_A_BASE)
def test_functions_for_plain_models_refuse_peft_models(call, patched, tmp_path):
    """lora_A and lora_B are linears too, which "all-linear" would mean."""
    model = peft_model("mlp")
    model.save_pretrained(tmp_path)
    if patched:
        fastlora.patch_peft(model)
    with untouched(model), pytest.raises(ValueError, match=r"2 of its layers .*unload\(\)"):
        TAKES_A_BASE[call](model, tmp_path)
    TAKES_A_BASE[call](model.unload(), tmp_path)


ASKS_FOR_OURS = {
    "save_adapter": lambda m: fastlora.save_adapter(m, "nowhere"),
    "adapter_state_dict": fastlora.adapter_state_dict,
    "merge_adapter": fastlora.merge_adapter,
    "unmerge_adapter": fastlora.unmerge_adapter,
    "merge_and_unload": fastlora.merge_and_unload,
    "swap_adapter": lambda m: fastlora.swap_adapter(m, "nowhere"),
    "disable_adapter": lambda m: fastlora.disable_adapter(m).__enter__(),
    "use_adapters": lambda m: fastlora.use_adapters(m, ["default"]).__enter__(),
    "adapter_parameters": lambda m: fastlora.adapter_parameters(m, "default"),
}


@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("call", ASKS_FOR_OURS)
def test_functions_for_fastlora_models_refuse_peft_models(call, patched):
    model = peft_model("mlp")
    if patched:
        fastlora.patch_peft(model)
    with untouched(model), pytest.raises(RuntimeError, match="the PEFT model's own methods"):
        ASKS_FOR_OURS[call](model)


@pytest.mark.parametrize("add", [inject_adapter, added_by_transformers])
def test_patch_peft_accepts_transformers_add_adapter(add):
    """As transformers' own integration has it, ``model.add_adapter``."""
    model, plain = llama(), llama()
    for each in (model, plain):
        add(each, config("llama"))
        fill_adapters(each).eval()
    found = fastlora.patch_peft(model)
    assert len(found.replaced) == 6
    assert_same(plain, model, lambda m: [run(m, inputs_of_tokens())])
    for each in (model, plain):
        add(each, config("llama", target_modules=["o_proj"]), "other")
        fill_adapters(each).eval()
    assert_same(plain, model, lambda m: [run(m, inputs_of_tokens())])
    reason = "not patched: call patch_peft again"
    assert set(fastlora.report(model).skipped.values()) == {reason}
    assert len(fastlora.patch_peft(model).replaced) == 8


@pytest.mark.parametrize("refuses", [False, True])
def test_patch_peft_warns_of_unsupported_virtual_tokens(refuses, monkeypatch, recwarn):
    """LoRA is patched in either case, and only a transformers that wants a newer PEFT is named."""
    wanted = "99.0.0" if refuses else "0.1.0"
    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", wanted)
    base = llama()
    inject_adapter(base, config("llama"))
    settings = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model, alone = peft.get_peft_model(fill_adapters(base), settings).eval(), peft_model("llama")
    want = run(model, inputs_of_tokens())
    assert len(fastlora.patch_peft(model).replaced) == 6
    fastlora.patch_peft(alone)
    assert_agree(run(model, inputs_of_tokens()), want)
    said = [w for w in recwarn if "generate of transformers" in str(w.message)]
    assert len(said) == refuses
    for warning in said:
        assert "may get wrong its PROMPT_TUNING of PEFT" in str(warning.message)
        assert "version >= 99.0.0" in str(warning.message)
        assert warning.filename == __file__


def test_patch_peft_accepts_mixed_lora_and_loha():
    loha = peft.LoHaConfig(r=2, target_modules=["lin0", "head"])
    models = []
    for _ in range(2):
        torch.manual_seed(1)
        model = peft.get_peft_model(Mlp(), config("mlp"), "lora", mixed=True)
        model.add_adapter("loha", loha)
        model.set_adapter(["lora", "loha"])
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1)
        models.append(fill_adapters(model).eval())
    found = fastlora.patch_peft(models[1])
    assert len(found.replaced) == 2
    assert_same(*models, lambda m: [m(torch.ones(3, 11))])
