"""modules_to_save that are not supported are refused by name, and nothing changes."""

from __future__ import annotations

from collections import OrderedDict

import pytest
from safetensors.torch import load_file, save_file
from torch import nn

import fastlora
from fastlora import LoRAConfig
from tests.support.models import llama, quiet, untouched
from tests.support.whole_modules import HEAD, classifier, counting, distilbert

pytestmark = quiet


def hooked_model() -> nn.Module:
    model = counting()
    model.head[0].forward = model.head[0].forward
    return model


def nested_model() -> nn.Module:
    return nn.Sequential(OrderedDict(tower=counting()))


REFUSALS = {
    "a typo": (counting, ["haed"], "no module's name ends in 'haed'"),
    "one of two": (counting, ["head", "haed"], "no module's name ends in 'haed'"),
    "a container": (counting, ["aux"], "ModuleList is not called itself"),
    "one in another": (counting, ["head", "head.0"], r"head\.0 in it is named too"),
    "hooks": (hooked_model, ["head"], r"forward of head\.0 was replaced"),
    "a lora layer": (counting, ["ody"], "puts LoRA into body"),
    "what has one in it": (nested_model, ["ower"], r"puts LoRA into tower\.body"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refused_modules_to_save_change_nothing(name):
    build, modules, says = REFUSALS[name]
    model = build()
    config = LoRAConfig(target_modules=["body"], modules_to_save=modules)
    with untouched(model), pytest.raises(ValueError, match=f"modules_to_save: .*{says}"):
        fastlora.replace_linear(model, config)


def test_all_linear_refuses_head_in_modules_to_save():
    """DistilBERT's pre_classifier: PEFT fails there too, after it has changed the model."""
    model = distilbert()
    config = LoRAConfig(target_modules="all-linear", task_type="SEQ_CLS")
    with untouched(model), pytest.raises(ValueError, match=r"modules_to_save: .*pre_classifier"):
        fastlora.replace_linear(model, config)
    excluding = LoRAConfig(
        target_modules="all-linear", task_type="SEQ_CLS", exclude_modules=["pre_classifier"]
    )
    assert len(fastlora.report(fastlora.replace_linear(model, excluding)).modules_to_save) == 2


def test_load_adapter_refuses_different_modules_to_save(tmp_path):
    fastlora.save_adapter(fastlora.replace_linear(llama(), HEAD), tmp_path / "whole")
    plain = LoRAConfig(r=4, target_modules=["q_proj"])
    fastlora.save_adapter(fastlora.replace_linear(llama(), plain), tmp_path / "plain")
    for config, folder in ((plain, "whole"), (HEAD, "plain")):
        model = fastlora.replace_linear(llama(), config)
        with untouched(model), pytest.raises(ValueError, match="modules_to_save: the model trains"):
            fastlora.load_adapter(model, tmp_path / folder)


@pytest.mark.parametrize("without", ["lm_head.weight", "q_proj.lora_A.weight"])
def test_load_adapter_refuses_file_without_saved_module(tmp_path, without):
    fastlora.save_adapter(fastlora.replace_linear(llama(), HEAD), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file({k: v for k, v in load_file(path).items() if not k.endswith(without)}, path)
    model = llama()
    with untouched(model), pytest.raises(ValueError, match=f"missing .*{without}"):
        fastlora.load_adapter(model, tmp_path)


def test_multi_adapter_uses_refuse_modules_to_save(tmp_path):
    fastlora.save_adapter(fastlora.replace_linear(llama(), HEAD), tmp_path)
    server = fastlora.MultiLoRAModel(llama())
    with pytest.raises(ValueError, match="modules_to_save"):
        server.load_adapter(tmp_path, "a")
    with pytest.raises(ValueError, match="modules_to_save"):
        fastlora.replace_linear(llama(), HEAD, adapter_names=["a", "b"])
    several = LoRAConfig(target_modules=["query"], task_type="SEQ_CLS")
    with pytest.raises(ValueError, match=r"modules_to_save: .*classifier"):
        fastlora.replace_linear(classifier(), several, adapter_names=["a", "b"])
    with pytest.raises(ValueError, match="modules_to_save"):
        fastlora.combine_adapters([tmp_path, tmp_path], [1, 1], tmp_path / "out")
    llama().save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match="modules_to_save"):
        fastlora.merge_checkpoint(tmp_path / "base", [tmp_path], tmp_path / "merged")
    merged = fastlora.merge_adapter(fastlora.load_adapter(llama(), tmp_path))
    with untouched(merged), pytest.raises(ValueError, match=r"modules_to_save: .* not swapped"):
        fastlora.swap_adapter(merged, tmp_path)
