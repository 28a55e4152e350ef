"""Saving and loading the adapter of a model: files, settings and refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import nn

import fastlora
from fastlora import FastLoRALinear, LoRAConfig
from fastlora.adapters import files as adapter_files
from fastlora.modules.layer import find_lora_layers
from tests.support.helpers import same_bits
from tests.support.models import (
    assert_agree,
    bert,
    error,
    llama,
    logits,
    randomise_lora,
    tokens,
    untouched,
)

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
QV = LoRAConfig(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"])
FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def adapted_model(config: LoRAConfig = QV, build: Callable[[], nn.Module] = llama) -> nn.Module:
    return randomise_lora(fastlora.replace_linear(build(), config))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A good adapter."""
    fastlora.save_adapter(adapted_model(), tmp_path)
    return tmp_path


@pytest.mark.parametrize("bad", ["merged", "bare", "layer"])
def test_save_adapter_refuses_merged_or_bare_models(tmp_path, bad):
    model = {"merged": adapted_model, "bare": llama, "layer": lambda: FastLoRALinear(4, 4)}[bad]()
    if bad == "merged":
        fastlora.merge_adapter(model)
    for save in (fastlora.adapter_state_dict, lambda m: fastlora.save_adapter(m, tmp_path)):
        with untouched(model), pytest.raises(RuntimeError, match=r"merged|expected one"):
            save(model)
    assert not list(tmp_path.iterdir())


def test_load_adapter_refuses_a_merged_model(folder):
    model = fastlora.merge_adapter(adapted_model())
    with untouched(model), pytest.raises(RuntimeError, match="merged"):
        fastlora.load_adapter(model, folder)


def test_save_adapter_refuses_path_of_a_file(tmp_path):
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(ValueError, match="got the file"):
        fastlora.save_adapter(adapted_model(), tmp_path / "taken")
    assert (tmp_path / "taken").read_text() == "mine"
    fastlora.save_adapter(adapted_model(), tmp_path / "new" / "folder")
    assert {p.name for p in (tmp_path / "new" / "folder").iterdir()} == {CONFIG, WEIGHTS}


@pytest.mark.parametrize("step", ["save_file", "Path.write_text", "Path.replace"])
def test_failed_save_leaves_old_files_unchanged(folder, monkeypatch, step):
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    def fail(*args: object, **kwargs: object) -> None:
        if step == "save_file":
            Path(str(args[1])).write_bytes(b"half a file")
        raise OSError("disk full")

    target = Path if "." in step else adapter_files
    monkeypatch.setattr(target, step.split(".")[-1], fail)
    with pytest.raises(OSError, match="disk full"):
        fastlora.save_adapter(adapted_model(), folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_adapter_state_dict_has_names_of_the_file(folder):
    model = fastlora.load_adapter(llama(), folder)
    state, saved = fastlora.adapter_state_dict(model), load_file(folder / WEIGHTS)
    assert state.keys() == saved.keys()
    assert all(same_bits(state[key].detach(), saved[key]) for key in saved)
    assert any(p is state[FIRST] for p in model.parameters())  # not copied


@pytest.mark.parametrize("is_trainable", [False, True])
@pytest.mark.parametrize("into", ["fresh", "adapted"])
def test_load_adapter_freezes_unless_is_trainable(tmp_path, into, is_trainable):
    config = LoRAConfig(target_modules=["query"], bias="all")
    fastlora.save_adapter(adapted_model(config, bert), tmp_path)
    plain = LoRAConfig(target_modules=["query"])
    model = bert() if into == "fresh" else adapted_model(plain, bert)
    fastlora.load_adapter(model, tmp_path, is_trainable=is_trainable)
    wanted = {n for n, _ in model.named_parameters() if "lora_" in n or n.endswith(".bias")}
    found = {n for n, p in model.named_parameters() if p.requires_grad}
    assert found == (wanted if is_trainable else set())


def test_load_adapter_takes_settings_of_the_file(tmp_path):
    """Or saving again would write a scaling that the adapter was not trained with."""
    config = LoRAConfig(
        r=4, lora_alpha=9, use_rslora=True, lora_dropout=0.2, target_modules=["q_proj"]
    )
    source, x = adapted_model(config), tokens(2, 5)
    fastlora.save_adapter(source, tmp_path / "a")
    model = adapted_model(LoRAConfig(r=4, target_modules=["q_proj"]))
    fastlora.load_adapter(model, tmp_path / "a")
    assert same_bits(logits(model, x), logits(source, x))
    fastlora.save_adapter(model, tmp_path / "b")
    assert_agree(logits(fastlora.load_adapter(llama(), tmp_path / "b"), x), logits(source, x))
    assert (tmp_path / "a" / CONFIG).read_text() == (tmp_path / "b" / CONFIG).read_text()
    assert {layer.lora_dropout for _, layer in find_lora_layers(model)} == {0.2}


def test_save_adapter_lists_layers_of_all_linear(tmp_path):
    """The file names the layers, so that it means the same where all-linear would not."""
    source = adapted_model(LoRAConfig(r=2, target_modules="all-linear"))
    fastlora.save_adapter(source, tmp_path)
    targets = json.loads((tmp_path / CONFIG).read_text())["target_modules"]
    assert targets == [name for name, _ in find_lora_layers(source)]
    model, x = fastlora.load_adapter(llama(), tmp_path), tokens(2, 5)
    assert same_bits(logits(model, x), logits(source, x))
    assert error(logits(llama(), x), logits(source, x)) > 0.1


def test_save_adapter_writes_shared_tensors_separately(tmp_path):
    """Also where they share memory, which safetensors would refuse."""
    model = adapted_model()
    layers = dict(find_lora_layers(model))
    first, second = list(layers.values())[:2]
    second.lora_A = first.lora_A
    fastlora.save_adapter(model, tmp_path)
    assert len(load_file(tmp_path / WEIGHTS)) == 8
