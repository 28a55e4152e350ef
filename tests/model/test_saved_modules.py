"""Modules trained whole beside an adapter, as PEFT trains, saves and loads them."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import peft
import pytest
import torch
from peft.utils.other import ModulesToSaveWrapper
from safetensors.torch import load_file
from torch import Tensor, nn

import fastlora
from fastlora import LoRAConfig
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
    tokens,
)
from tests.support.whole_modules import (
    HEAD,
    classifier,
    counting,
    distilbert,
    move_trained_parameters,
)

pytestmark = quiet


def trained_names(theirs: nn.Module) -> set[str]:
    return {
        n.removeprefix("base_model.model.")
        .replace(".modules_to_save.default", "")
        .replace("lora_B.default.bias", "lora_bias")
        .replace(".default.weight", "")
        .replace(".base_layer", "")
        for n, p in theirs.named_parameters()
        if p.requires_grad
    }


def saved_module_names(theirs: nn.Module) -> set[str]:
    wrappers = (n for n, m in theirs.named_modules() if isinstance(m, ModulesToSaveWrapper))
    return {name.removeprefix("base_model.model.") for name in wrappers}


CASES = {
    "head": (llama, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "embedding too": (
        llama,
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    ),
    "tied": (
        lambda: llama(tie_word_embeddings=True),
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    ),
    "by the end of a name": (
        llama,
        {"target_modules": ["q_proj"], "modules_to_save": ["head", "layers.1.mlp"]},
    ),
    "all-linear": (llama, {"target_modules": "all-linear", "modules_to_save": ["o_proj", "norm"]}),
    "regex": (llama, {"target_modules": ".*(q|up)_proj", "modules_to_save": ["layers.0.mlp"]}),
    "classification": (classifier, {"target_modules": ["query"], "task_type": "SEQ_CLS"}),
    "all of a classification": (
        classifier,
        {"target_modules": "all-linear", "task_type": "SEQ_CLS", "bias": "lora_only"},
    ),
    "biases of a classification": (
        classifier,
        {"target_modules": ["query"], "task_type": "SEQ_CLS", "bias": "all"},
    ),
    "and more": (
        classifier,
        {"target_modules": ["key"], "task_type": "SEQ_CLS", "modules_to_save": ["pooler"]},
    ),
    "two heads": (distilbert, {"target_modules": ["q_lin"], "task_type": "SEQ_CLS"}),
    "tokens": (
        lambda: bert(head="TokenClassification"),
        {"target_modules": ["query", "dense"], "task_type": "TOKEN_CLS", "lora_bias": True},
    ),
    "score": (
        lambda: gpt2(head="SequenceClassification", pad_token_id=0),
        {"target_modules": ["c_attn"], "task_type": "SEQ_CLS", "fan_in_fan_out": True},
    ),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest):
    return CASES[request.param]


def test_modules_to_save_train_as_in_peft(case):
    build, options = case
    ours = fastlora.replace_linear(build(), LoRAConfig(**options))
    theirs = peft.get_peft_model(build(), peft.LoraConfig(**options))
    assert {n for n, p in ours.named_parameters() if p.requires_grad} == trained_names(theirs)
    assert set(fastlora.report(ours).modules_to_save) == saved_module_names(theirs)
    assert {n for n in ours.state_dict() if "lora" not in n} == build().state_dict().keys()


def test_peft_loads_modules_saved_by_fastlora(tmp_path, case):
    build, options = case
    ours, ids = (
        move_trained_parameters(fastlora.replace_linear(build(), LoRAConfig(**options))),
        tokens(2, 9),
    )
    fastlora.save_adapter(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(build(), str(tmp_path)).eval()
    assert_agree(logits(ours, ids), logits(theirs, ids), logits(build(), ids))


def test_fastlora_loads_and_resaves_modules_of_peft(tmp_path, case):
    build, options = case
    theirs, ids = (
        move_trained_parameters(peft.get_peft_model(build(), peft.LoraConfig(**options))),
        tokens(2, 9),
    )
    theirs.save_pretrained(str(tmp_path / "peft"), save_embedding_layers=False)
    ours = fastlora.load_adapter(build(), tmp_path / "peft")
    assert_agree(logits(ours, ids), logits(theirs, ids), logits(build(), ids))
    assert not any(p.requires_grad for p in ours.parameters())
    fastlora.save_adapter(ours, tmp_path / "back")
    files = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("peft", "back")]
    assert files[0].keys() == files[1].keys()
    assert all(same_bits(files[0][name], files[1][name]) for name in files[0])


def test_disable_adapter_uses_original_modules(case):
    build, options = case
    ours, ids = (
        move_trained_parameters(fastlora.replace_linear(build(), LoRAConfig(**options))),
        tokens(2, 9),
    )
    if options.get("bias", "none") != "none":
        pytest.skip("trained biases of the base stay, in PEFT too")
    trained = logits(ours, ids)
    with fastlora.disable_adapter(ours), fastlora.disable_adapter(ours):
        assert_agree(logits(ours, ids), logits(build(), ids), trained)
        saved = fastlora.adapter_state_dict(ours)
    assert same_bits(logits(ours, ids), trained)
    assert all(same_bits(t, saved[key]) for key, t in fastlora.adapter_state_dict(ours).items())


def test_merge_and_unload_keeps_trained_modules(tmp_path, case):
    build, options = case
    ours, ids = (
        move_trained_parameters(fastlora.replace_linear(build(), LoRAConfig(**options))),
        tokens(2, 9),
    )
    fastlora.save_adapter(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(build(), str(tmp_path)).eval()
    want, copies = logits(ours, ids), fastlora.report(ours).modules_to_save
    modules = [ours.get_submodule(name) for name in copies]
    fastlora.merge_adapter(ours)
    assert_agree(logits(ours, ids), want)
    fastlora.unmerge_adapter(ours)
    assert same_bits(logits(ours, ids), want)
    fastlora.merge_and_unload(ours)
    assert [ours.get_submodule(name) for name in copies] == modules
    merged = theirs if options.get("lora_bias") else theirs.merge_and_unload()
    assert_agree(logits(ours, ids), logits(merged, ids), logits(build(), ids))
    assert fastlora.report(ours).modules_to_save == ()
    if not options.get("lora_bias"):
        assert ours.config.tie_word_embeddings == merged.config.tie_word_embeddings


def test_saved_modules_have_gradients_of_peft():
    options = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "layers.1.mlp"]}
    ours = move_trained_parameters(fastlora.replace_linear(llama(), LoRAConfig(**options)))
    theirs = peft.get_peft_model(llama(), peft.LoraConfig(**options)).eval()
    values = fastlora.adapter_state_dict(ours)
    peft.set_peft_model_state_dict(theirs, {k: v.detach() for k, v in values.items()})
    ids = tokens(2, 7)
    for model in (ours, theirs):
        model(input_ids=ids, labels=ids).loss.backward()
    wanted = {
        n.removeprefix("base_model.model.").replace(".modules_to_save.default", ""): p.grad
        for n, p in theirs.named_parameters()
        if "modules_to_save" in n
    }
    got = dict(ours.named_parameters())
    assert len(wanted) == 4
    for name, grad in wanted.items():
        assert error(got[name].grad, grad) <= 10 * TOLERANCE[torch.float32]


def test_modules_to_save_leave_original_module_unchanged():
    """The copy is the model's, the original trains no more and is as it was."""
    model = llama()
    head, before = model.lm_head, model.lm_head.weight.detach().clone()
    fastlora.replace_linear(model, HEAD)
    assert model.lm_head is not head
    assert type(model.lm_head) is nn.Linear
    move_trained_parameters(model)
    assert same_bits(head.weight, before)
    assert not head.weight.requires_grad
    assert "trained whole: lm_head" in str(fastlora.report(model))
    with fastlora.disable_adapter(model):
        assert model.lm_head is head
        assert model.get_output_embeddings() is head


def test_original_module_follows_dtype_and_mode_of_copy():
    """It is not in the model while the model is moved, cast, or put into another mode."""
    model, ids = fastlora.replace_linear(llama(), HEAD), tokens(2, 5)
    move_trained_parameters(model).to(torch.bfloat16).train()
    with fastlora.disable_adapter(model):
        assert model.lm_head.training
        want = logits(llama(dtype=torch.bfloat16), ids)
        assert same_bits(logits(model.eval(), ids), want)


def test_copied_model_has_separate_original_modules():
    model, ids = move_trained_parameters(fastlora.replace_linear(llama(), HEAD)), tokens(2, 5)
    twin = copy.deepcopy(model)
    want = logits(twin, ids)
    nn.init.zeros_(model.lm_head.weight)
    with fastlora.disable_adapter(model):
        nn.init.zeros_(model.lm_head.weight)
    assert same_bits(logits(twin, ids), want)
    with fastlora.disable_adapter(twin):
        assert_agree(logits(twin, ids), logits(llama(), ids), want)


def test_modules_to_save_load_integer_buffers(tmp_path):
    config = LoRAConfig(target_modules=["body"], modules_to_save=["head"], r=2)
    theirs = peft.get_peft_model(
        counting(), peft.LoraConfig(target_modules=["body"], modules_to_save=["head"], r=2)
    )
    x = torch.randn(5, 6)
    theirs.train()(x)
    theirs.eval().save_pretrained(str(tmp_path))
    ours = fastlora.load_adapter(counting(), tmp_path, is_trainable=True)
    assert_agree(ours(x), theirs(x), counting()(x))
    assert int(ours.head[1].num_batches_tracked) == 1
    assert ours.head[0].weight.requires_grad
    again = fastlora.replace_linear(counting(), config)
    fastlora.load_adapter(again, tmp_path)
    assert_agree(again(x), theirs(x))


class Aliased(nn.Module):
    """A head by two names, and one whose parent has two."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(6, 6)
        self.head = nn.Linear(6, 6)
        self.other_head = self.head
        self.tower = nn.ModuleDict({"top": nn.Linear(6, 6)})
        self.again = self.tower

    def forward(self, x: Tensor) -> Tensor:
        return self.tower["top"](self.other_head(self.head(self.q(x))))


def aliased_model() -> Aliased:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Aliased()


def test_aliased_modules_are_saved_as_in_peft(tmp_path):
    options = {"target_modules": ["q"], "modules_to_save": ["head", "top"], "r": 2}
    theirs = move_trained_parameters(
        peft.get_peft_model(aliased_model(), peft.LoraConfig(**options))
    )
    theirs.save_pretrained(str(tmp_path))
    ours, x = fastlora.load_adapter(aliased_model(), tmp_path), torch.randn(3, 6)
    assert_agree(ours(x), theirs(x), aliased_model()(x))
    assert ours.head is not ours.other_head
    assert ours.again is ours.tower
    fastlora.save_adapter(ours, tmp_path / "back")
    files = [load_file(f / "adapter_model.safetensors") for f in (tmp_path, tmp_path / "back")]
    assert files[0].keys() == files[1].keys()


def test_repeated_head_names_of_peft_are_saved_once(tmp_path: Path):
    """PEFT names them twice after each loading; ours says once what it says first."""
    config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query"])
    peft.get_peft_model(classifier(), config).save_pretrained(str(tmp_path))
    peft.PeftModel.from_pretrained(classifier(), str(tmp_path)).save_pretrained(str(tmp_path))
    said = json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"]
    assert said == ["classifier", "score"] * 2
    fastlora.save_adapter(fastlora.load_adapter(classifier(), tmp_path), tmp_path)
    said = json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"]
    assert said == ["classifier", "score"]
