"""Adapters travel between fastlora and PEFT and compute the same on either side."""

# Tolerances are those of tests/support/models.py; every adapter moves the output by ten of them.

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import fastlora
from tests.support.helpers import same_bits
from tests.support.models import assert_agree, bert, llama, logits, quiet, randomise_lora, tokens

CAUSAL = {
    "plain": {"target_modules": ["q_proj", "v_proj"]},
    "alpha": {"target_modules": ["q_proj"], "r": 3, "lora_alpha": 16.5},
    "rslora": {"target_modules": ["q_proj", "down_proj"], "use_rslora": True, "r": 4},
    "all-linear": {"target_modules": "all-linear", "r": 2},
    "regex": {"target_modules": r".*\.(o|up)_proj"},
    "excluded": {"target_modules": "all-linear", "exclude_modules": ["q_proj"]},
    "ranks": {
        "target_modules": "all-linear",
        "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.\w+": 3},
        "alpha_pattern": {"v_proj": 32},
    },
    "lora_bias": {"target_modules": ["q_proj", "up_proj"], "lora_bias": True},
    "dropout": {"target_modules": ["q_proj"], "lora_dropout": 0.5},
    "gaussian": {"target_modules": ["q_proj"], "init_lora_weights": "gaussian"},
    "head": {"target_modules": ["lm_head", "q_proj"]},
    "layer": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": 0},
    "layers": {
        "target_modules": ["q_proj", "model.layers.0.mlp.up_proj"],
        "layers_to_transform": [1, 2],
        "layers_pattern": ["h", "layers"],
    },
    "typed": {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM"},
}
MASKED = {
    "plain": {"target_modules": ["query", "value"]},
    "all-linear": {"target_modules": "all-linear", "r": 4},
    "ranks": {"target_modules": ["query", "dense"], "rank_pattern": {"dense": 3}},
    "lora_bias": {"target_modules": ["query", "dense"], "lora_bias": True, "use_rslora": True},
    "bias all": {"target_modules": ["query"], "bias": "all"},
    "bias lora_only": {"target_modules": ["query", "dense"], "bias": "lora_only"},
    "bias both": {"target_modules": "all-linear", "bias": "lora_only", "lora_bias": True},
}
CASES = [
    *(pytest.param(llama, options, id=f"llama {name}") for name, options in CAUSAL.items()),
    *(pytest.param(bert, options, id=f"bert {name}") for name, options in MASKED.items()),
]
pytestmark = quiet


def trained_a_little(model: nn.Module) -> nn.Module:
    """As if it had been trained: every parameter that would be is somewhere else."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    return randomise_lora(model).eval()


def padded_ids_and_mask(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    """Ids of two rows, and a mask under which the second is shorter."""
    ids = tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    return ids, {"attention_mask": mask}


@pytest.mark.parametrize("build, options", CASES)
def test_peft_loads_an_adapter_from_fastlora(tmp_path, build, options):
    ours = trained_a_little(fastlora.replace_linear(build(), fastlora.LoRAConfig(**options)))
    fastlora.save_adapter(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(build(), str(tmp_path)).eval()
    ids, mask = padded_ids_and_mask(ours)
    assert_agree(
        logits(ours, ids, **mask), logits(theirs, ids, **mask), logits(build(), ids, **mask)
    )


@pytest.mark.parametrize("build, options", CASES)
def test_peft_adapter_survives_loading_and_saving(tmp_path, build, options):
    theirs = trained_a_little(peft.get_peft_model(build(), peft.LoraConfig(**options)))
    theirs.save_pretrained(str(tmp_path / "peft"), save_embedding_layers=False)
    ours = fastlora.load_adapter(build(), tmp_path / "peft")
    ids, mask = padded_ids_and_mask(ours)
    assert_agree(
        logits(ours, ids, **mask), logits(theirs, ids, **mask), logits(build(), ids, **mask)
    )
    fastlora.save_adapter(ours, tmp_path / "back")
    files = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("peft", "back")]
    assert files[0].keys() == files[1].keys()
    assert all(same_bits(files[0][name], files[1][name]) for name in files[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("saved", ["float32", "half"])
def test_adapter_on_half_base_matches_peft(tmp_path, dtype, saved):
    """Adapters are float32 there on both sides, whatever the file holds."""
    config = peft.LoraConfig(target_modules="all-linear", r=4)
    theirs = trained_a_little(peft.get_peft_model(llama(dtype=dtype), config))
    if saved == "half":
        theirs = theirs.to(dtype)
    theirs.save_pretrained(str(tmp_path))
    theirs = peft.PeftModel.from_pretrained(llama(dtype=dtype), str(tmp_path)).eval()
    ours = fastlora.load_adapter(llama(dtype=dtype), tmp_path)
    found = {t.dtype for t in fastlora.adapter_state_dict(ours).values()}
    assert found == {p.dtype for n, p in theirs.named_parameters() if "lora" in n}
    ids = tokens(2, 9)
    assert_agree(logits(ours, ids), logits(theirs, ids), logits(llama(dtype=dtype), ids))


def test_config_of_old_peft_loads(tmp_path: Path):
    """What PEFT 0.4 wrote: the rest has the defaults of then, which are those of now."""
    theirs = trained_a_little(
        peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"]))
    )
    theirs.save_pretrained(str(tmp_path))
    old = {
        "auto_mapping": None, "base_model_name_or_path": None, "bias": "none",
        "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True,
        "layers_pattern": None, "layers_to_transform": None, "lora_alpha": 8, "lora_dropout": 0.0,
        "modules_to_save": None, "peft_type": "LORA", "r": 8, "revision": None,
        "target_modules": ["q_proj"], "task_type": "CAUSAL_LM",
    }  # fmt: skip
    (tmp_path / "adapter_config.json").write_text(json.dumps(old))
    ids = tokens(2, 5)
    ours = fastlora.load_adapter(llama(), tmp_path)
    assert_agree(logits(ours, ids), logits(theirs, ids), logits(llama(), ids))


def test_merged_models_agree_with_peft(tmp_path):
    theirs = trained_a_little(
        peft.get_peft_model(llama(), peft.LoraConfig(target_modules="all-linear"))
    )
    theirs.save_pretrained(str(tmp_path))
    ours = fastlora.load_adapter(llama(), tmp_path)
    fastlora.merge_and_unload(ours)
    merged, ids = theirs.merge_and_unload(), tokens(2, 5)
    assert_agree(logits(ours, ids), logits(merged, ids), logits(llama(), ids))
    assert list(ours.state_dict()) == list(merged.state_dict())
