"""Merging refuses layers whose names fit twice or nowhere, and layers never called."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import fastlora
from tests.support.checkpoints import (
    CONFIG,
    PREFIX,
    SINGLE,
    Q,
    edit_adapter,
    edit_json,
    edit_settings,
    edit_tensors,
    merge,
    save_adapter,
    save_base,
)
from tests.support.models import quiet
from tests.support.readers import wavlm

pytestmark = quiet


def test_merge_refuses_names_that_fit_two_towers(tmp_path):
    base = save_base(tmp_path / "base", size="1GB")
    edit_tensors(
        base / SINGLE, lambda t: {f"{p}.{n}": v.clone() for n, v in t.items() for p in "ab"}
    )
    save_adapter(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"fit several parts of .*, with 'a\.' and 'b\.'"):
        merge(tmp_path)


def test_merge_refuses_layers_missing_in_the_base(base_and_adapter):
    """Named, and left out where that is asked for."""

    def change(t: dict[str, Tensor]) -> None:
        for part in "AB":
            t.pop(f"{PREFIX}model.layers.1.mlp.up_proj.lora_{part}.weight")
            moved = t.pop(f"{PREFIX}{Q}.lora_{part}.weight")
            t[f"{PREFIX}model.layers.7.self_attn.q_proj.lora_{part}.weight"] = moved

    edit_adapter(base_and_adapter, change)
    edit_settings(base_and_adapter, target_modules=r".*\d\.\w+\.[a-z]+_proj")
    with pytest.raises(ValueError) as refused:
        merge(base_and_adapter)
    base = base_and_adapter / "base"
    absent = f"1 of its 13 layers are not in {base}: model.layers.7.self_attn.q_proj; "
    unfilled = f"2 layers that its file lacks: {Q}, model.layers.1.mlp.up_proj; "
    assert f"{absent}its config names {unfilled}the others" in str(refused.value)
    assert "--allow-partial" in str(refused.value)
    assert not (base_and_adapter / "out").exists()
    with pytest.warns(UserWarning, match="3 layers were left out: model.layers.7"):
        found = merge(base_and_adapter, allow_partial=True)
    assert len(found) == 12


def test_merge_refuses_layers_the_model_never_calls(tmp_path):
    """Merged they would come to work for the first time."""
    base, adapter, out = (tmp_path / name for name in ("base", "adapter", "out"))
    wavlm().save_pretrained(base)
    save_adapter(adapter, wavlm(), target_modules=["q_proj", "intermediate_dense"])
    says = r"q_proj and 1 more: WavLMAttention\.torch_multi_head_self_attention reads its weight"
    with pytest.raises(ValueError, match=says):
        fastlora.merge_checkpoint(base, adapter, out)
    assert not out.exists()
    with pytest.warns(UserWarning, match="2 layers were left out: .*q_proj of .*has had no part"):
        merged = fastlora.merge_checkpoint(base, adapter, out, allow_partial=True)
    assert {name.rpartition(".")[2] for name in merged} == {"intermediate_dense"}
    # What adds nothing may be merged, and of a class that transformers lacks nothing is known.
    idle = tmp_path / "idle"
    save_adapter(idle, wavlm(), std=0.0, target_modules=["q_proj"])
    fastlora.merge_checkpoint(base, idle, tmp_path / "second")
    edit_json(base / CONFIG, architectures=["SomebodysWavLM"])
    fastlora.merge_checkpoint(base, adapter, tmp_path / "third")


def test_merge_refuses_weight_shared_by_several_layers(tmp_path):
    transformers = pytest.importorskip("transformers")
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    config = transformers.GroundingDinoConfig(architectures=["GroundingDinoForObjectDetection"])
    config.save_pretrained(base)
    layer, size = "bbox_embed.0.layers.0", config.d_model
    save_file({f"{layer}.weight": torch.randn(size, size)}, base / SINGLE)
    adapter.mkdir()
    A, B = torch.randn(2, size), torch.randn(size, 2)
    factors = {f"{PREFIX}{layer}.lora_A.weight": A, f"{PREFIX}{layer}.lora_B.weight": B}
    save_file(factors, adapter / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": [layer]}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=rf"{layer}: its weight is also that of bbox_embed\.1\."):
        fastlora.merge_checkpoint(base, adapter, tmp_path / "out")
