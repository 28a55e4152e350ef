"""replace_linear replaces all requested layers, or raises and changes nothing."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from torch import nn

import fastlora
from fastlora import FastLoRALinear, LoRAConfig
from fastlora.modules.layer import find_lora_layers
from tests.support.helpers import same_bits
from tests.support.models import (
    TOLERANCE,
    assert_agree,
    bert,
    error,
    gpt2,
    llama,
    logits,
    quiet,
    randomise_lora,
    t5,
    tokens,
    untouched,
)

ALL = LoRAConfig(r=4, target_modules="all-linear")
QV = ["q_proj", "v_proj"]
pytestmark = quiet


def replaced_names(model: nn.Module) -> set[str]:
    return {name for name, _ in find_lora_layers(model)}


def trainable_names(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_replace_linear_works_in_place_and_reports():
    model = llama()
    weights = {name: p.data_ptr() for name, p in model.named_parameters()}
    assert fastlora.replace_linear(model, LoRAConfig(r=4, target_modules=QV)) is model
    assert {n: p.data_ptr() for n, p in model.named_parameters() if "lora" not in n} == weights
    found = fastlora.report(model)
    names = [f"model.layers.{i}.self_attn.{n}" for i in range(2) for n in QV]
    assert found.replaced == dict.fromkeys(names, 4)
    assert (found.skipped, found.merged) == ({}, ())
    assert found.trainable == sum(p.numel() for n, p in model.named_parameters() if "lora" in n)
    assert found.total == sum(p.numel() for p in model.parameters())
    assert "4 layers replaced (r=4)" in str(found)
    assert trainable_names(model) == {f"{n}.{k}" for n in names for k in ("lora_A", "lora_B")}
    fastlora.merge_adapter(model)
    assert fastlora.report(model).merged == tuple(names)


@fastlora.use_backend("torch")  # whose base product is nn.Linear's, bit for bit
def test_replace_linear_keeps_outputs_until_trained():
    model, x = llama(), tokens(2, 6)
    want = logits(model, x)
    assert same_bits(logits(fastlora.replace_linear(model, ALL), x), want)
    assert error(logits(randomise_lora(model), x), want) > 0.1


def test_report_of_model_without_lora_is_empty():
    found = fastlora.report(nn.Linear(4, 4))  # a layer is a model too
    assert (found.replaced, found.skipped, found.trainable, found.total) == ({}, {}, 20, 20)


@pytest.mark.parametrize("tied", [False, True])
def test_all_linear_leaves_the_head_out(tied):
    model = fastlora.replace_linear(llama(tie_word_embeddings=tied), ALL)
    assert replaced_names(model) == set(fastlora.report(model).replaced)
    assert len(replaced_names(model)) == 14
    assert type(model.lm_head) is nn.Linear
    assert set(fastlora.report(model).skipped) == {"lm_head"}
    assert "lm_head" in str(fastlora.report(model))
    named, config = llama(tie_word_embeddings=tied), LoRAConfig(target_modules=["lm_head"])
    assert replaced_names(fastlora.replace_linear(named, config)) == {"lm_head"}


@pytest.mark.parametrize("build", [llama, bert, t5, gpt2])
@pytest.mark.filterwarnings("ignore:fan_in_fan_out=False holds for none")
def test_all_linear_chooses_the_layers_of_peft(build):
    theirs = peft.inject_adapter_in_model(peft.LoraConfig(target_modules="all-linear"), build())
    wanted = {n for n, m in theirs.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    assert replaced_names(fastlora.replace_linear(build(), ALL)) == wanted


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
@pytest.mark.parametrize("lora_bias", [False, True])
def test_trainable_parameters_are_those_of_peft(bias, lora_bias):
    config = peft.LoraConfig(target_modules=["query", "dense"], bias=bias, lora_bias=lora_bias)
    ours = fastlora.replace_linear(bert(), config)
    theirs = peft.get_peft_model(bert(), config)
    renamed = {
        n.removeprefix("base_model.model.")
        .replace("lora_B.default.bias", "lora_bias")
        .replace(".default.weight", "")
        .replace(".base_layer", "")
        for n in trainable_names(theirs)
    }
    assert trainable_names(ours) == renamed
    assert any(n.endswith(".bias") for n in renamed) == (bias != "none")


def test_freeze_base_false_trains_the_base_too():
    model = llama()
    model.model.embed_tokens.requires_grad_(False)
    before = trainable_names(model)
    fastlora.replace_linear(model, ALL, freeze_base=False)
    assert {n for n in trainable_names(model) if "lora" not in n} == before
    model(input_ids=tokens(2, 5)).logits.sum().backward()
    layer = model.model.layers[0].mlp.up_proj
    assert layer.weight.grad is not None
    assert layer.lora_B.grad is not None


def test_training_losses_match_those_of_peft():
    """Ten AdamW steps from the same start: losses agree, and the loss has moved."""
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    theirs = peft.get_peft_model(llama(), config)
    ours = fastlora.replace_linear(llama(), config)
    adapter = peft.get_peft_model_state_dict(theirs)
    for name, tensor in fastlora.adapter_state_dict(ours).items():
        tensor.data.copy_(adapter[name])
    x, losses = tokens(4, 8), []
    for model in (ours, theirs):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses.append([])
        for _ in range(10):
            loss = model(input_ids=x, labels=x).loss
            losses[-1].append(loss.item())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    # Adam divides by gradients' own size, which lets rounding grow a hundredfold in ten steps.
    assert losses[0] == pytest.approx(losses[1], rel=100 * TOLERANCE[torch.float32])
    assert losses[0][-1] < 0.9 * losses[0][0]


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated")
def test_gradient_checkpointing_gives_the_same_gradients():
    model = fastlora.replace_linear(
        llama(), LoRAConfig(target_modules="all-linear", lora_dropout=0.3, init_lora_weights=False)
    ).train()
    x, grads = tokens(2, 6), []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(1)
        model(input_ids=x, labels=x).loss.backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
        model.zero_grad()
    assert all(same_bits(a, b) for a, b in zip(*grads, strict=True))


def test_replace_linear_reaches_inside_compiled_model():
    torch.compiler.reset()
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    compiled, x = torch.compile(model, fullgraph=True, backend="eager"), torch.randn(3, 6)
    before = compiled(x).detach()
    assert fastlora.replace_linear(compiled, ALL) is compiled
    randomise_lora(model)
    assert replaced_names(model) == replaced_names(compiled) == {"0", "2"}
    assert_agree(compiled(x), model(x), before)


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.again = self.first
        self.other = nn.Linear(6, 6)

    def forward(self, x):
        return self.other(self.again(self.first(x)))


def test_shared_layer_gets_adapter_at_first_place(tmp_path):
    settings = {"r": 2, "target_modules": ["first", "other"], "init_lora_weights": False}
    base, x = Shared(), torch.randn(3, 6)
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**settings))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = copy.deepcopy(base)
    with pytest.warns(UserWarning, match="first: the same layer is also at again, and has its"):
        fastlora.replace_linear(ours, LoRAConfig(**settings))
    assert (type(ours.first), type(ours.again)) == (FastLoRALinear, nn.Linear)
    assert ours.again.weight is ours.first.weight
    # Each other's files mean the same function, served too.
    fastlora.load_adapter(ours, tmp_path / "theirs")
    assert_agree(ours(x), theirs(x).detach(), base(x).detach())
    fastlora.save_adapter(ours, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "ours"))
    assert_agree(again(x), theirs(x).detach())
    server = fastlora.MultiLoRAModel(copy.deepcopy(base), target_modules=["first", "other"])
    server.load_adapter(tmp_path / "theirs", "a")
    assert_agree(server(x, adapter_names=["a"] * 3), theirs(x).detach())
    # A merge, or a split of the weight, would change the other place.
    with untouched(ours), pytest.raises(RuntimeError, match=r"first: .* tied with again\.weight"):
        fastlora.merge_adapter(ours)
    fastlora.merge_and_unload(ours, untie=True)
    assert_agree(ours(x), theirs(x).detach())
    with untouched(base), pytest.raises(ValueError, match=r"first: .* tied with again\.weight"):
        fastlora.replace_linear(base, LoRAConfig(**settings | {"init_lora_weights": "pissa"}))


def test_shared_layer_is_matched_by_first_name():
    model, config = Shared(), LoRAConfig(target_modules=["again"])
    with untouched(model), pytest.raises(ValueError, match="again: it is the same layer as first"):
        fastlora.replace_linear(model, config)
    with pytest.raises(ValueError, match="not found"):
        peft.get_peft_model(Shared(), peft.LoraConfig(target_modules=["again"]))
    # One parent of two names is one place.
    model = nn.ModuleDict({"a": nn.ModuleDict({"lin": nn.Linear(4, 4)})})
    model["b"] = model["a"]
    fastlora.replace_linear(model, LoRAConfig(target_modules=["lin"]))
    assert isinstance(model["b"]["lin"], FastLoRALinear)
    assert fastlora.report(model).replaced == {"a.lin": 8}


@pytest.mark.parametrize(
    "options, hint",
    [
        ({"target_modules": ["q_prj"]}, "near names: q_proj"),
        ({"target_modules": ["c_attn"]}, "its linears end in down_proj, gate_proj, k_proj"),
        ({"target_modules": "q_proj"}, "no linear layer matches"),  # a regex must match in full
        ({"target_modules": []}, "no linear layer matches"),
        ({}, "target_modules: expected a list of names"),
        ({"target_modules": ["q_proj"], "exclude_modules": r".*q_proj"}, "2 skipped: .*excluded"),
        (
            {"target_modules": ["q_proj"], "layers_to_transform": [2, -1]},
            r"no linear layer matches \('q_proj',\) within layers_to_transform=\(2, -1\)",
        ),
        (
            {"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "h"},
            "within layers_to_transform=0 of 'h'",
        ),
        (
            {"target_modules": ["q_proj"], "modules_to_save": ["self_attn"]},
            "2 skipped: .*modules_to_save trains it whole",
        ),
    ],
)
def test_replace_linear_refuses_targets_that_match_nothing(options, hint):
    model = llama()
    with untouched(model), pytest.raises(ValueError, match=hint):
        fastlora.replace_linear(model, LoRAConfig(**options))
    assert fastlora.report(model).replaced == {}


@pytest.mark.parametrize("again", ["all-linear", ["q_proj"], ["v_proj"], ["up_proj"]])
def test_replace_linear_refuses_model_with_lora(again):
    """Also where no layer is named twice: one adapter file has one config."""
    model = fastlora.replace_linear(llama(), LoRAConfig(target_modules=QV))
    with untouched(model), pytest.raises(ValueError, match="already"):
        fastlora.replace_linear(model, LoRAConfig(target_modules=again))
    fastlora.replace_linear(fastlora.merge_and_unload(model), LoRAConfig(target_modules=again))
