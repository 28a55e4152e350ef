"""LoRAConfig means what PEFT's LoraConfig means, and refuses the rest by name."""

from __future__ import annotations

import dataclasses
import json

import peft
import pytest
from hypothesis import strategies as st

from fastlora import LoRAConfig
from fastlora.config import refusals

OWN = {f.name for f in dataclasses.fields(LoRAConfig)}
PEFT = {f.name: f for f in dataclasses.fields(peft.LoraConfig)}
# They describe the file, or tune an option that is refused itself.
DESCRIPTIVE = {"auto_mapping", "inference_mode", "megatron_core", "peft_type", "peft_version"}
DESCRIPTIVE |= {"qalora_group_size", "revision", "runtime_config"}
REFUSED = {
    "alora_invocation_tokens", "arrow_config", "corda_config", "ensure_weight_tying", "eva_config",
    "kasa_config", "layer_replication", "loftq_config", "lora_ga_config", "megatron_config",
    "monteclora_config", "target_parameters", "trainable_token_indices", "use_bdlora", "use_dora",
    "use_qalora", "velora_config",
}  # fmt: skip
OTHER = sorted(PEFT.keys() - OWN - DESCRIPTIVE)

FULL = {
    "r": 4,
    "lora_alpha": 6,
    "target_modules": ["q_proj"],  # PEFT writes several in any order
    "exclude_modules": ["layers.1.self_attn.q_proj"],
    "lora_dropout": 0.25,
    "bias": "lora_only",
    "use_rslora": True,
    "lora_bias": True,
    "init_lora_weights": False,
    "rank_pattern": {"q_proj": 2},
    "alpha_pattern": {"v_proj": 16},
    "layers_to_transform": [0, 2],
    "layers_pattern": ["layers"],
    "modules_to_save": ["lm_head"],
    "fan_in_fan_out": True,
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": "somewhere",
}


def test_every_peft_field_is_known():
    """One that a new PEFT brings is refused by ``from_dict``, and shows up here."""
    assert not OWN & REFUSED | OWN & DESCRIPTIVE
    assert {*OTHER} == REFUSED == refusals.FIELDS.keys()


def test_config_has_names_and_defaults_of_peft():
    assert PEFT.keys() >= OWN
    ours, theirs = LoRAConfig(), peft.LoraConfig()
    assert {n: getattr(ours, n) for n in OWN} == {n: getattr(theirs, n) for n in OWN}


def test_config_reads_and_writes_files_of_peft(tmp_path):
    peft.LoraConfig(**FULL).save_pretrained(tmp_path)
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    config = LoRAConfig.from_dict(values)
    written = json.loads(json.dumps(config.to_dict()))
    assert LoRAConfig.from_dict(written) == config
    assert {n: written[n] for n in OWN} == FULL
    (tmp_path / "adapter_config.json").write_text(json.dumps(written))
    reread = peft.LoraConfig.from_pretrained(str(tmp_path))
    assert LoRAConfig.of(reread) == config


@pytest.mark.parametrize("name", OTHER)
def test_from_dict_refuses_unsupported_peft_fields(name):
    default = PEFT[name].default
    value = True if default is False else ["something"]
    with pytest.raises(ValueError, match=rf"does not support {name}="):
        LoRAConfig.from_dict({"r": 4, name: value})
    for empty in (None, False, "", [], {}):
        assert LoRAConfig.from_dict({"r": 4, name: empty}) == LoRAConfig(r=4)


@pytest.mark.filterwarnings("ignore:aLoRA is currently only supported")
@pytest.mark.parametrize(
    "option",
    [
        {"use_dora": True},
        {"target_parameters": ["weight"]},
        {"ensure_weight_tying": True},
        {"megatron_config": {"tensor_model_parallel_size": 2}},
        {"use_qalora": True},
        {"use_bdlora": {"target_modules_bd_a": ["q_proj"]}},
        {"velora_config": {}},
        {"trainable_token_indices": [1]},
        {"layer_replication": [(0, 1)]},
        {"alora_invocation_tokens": [1]},
        {"init_lora_weights": "mica"},
        {"init_lora_weights": "lora_ga"},
        {"eva_config": {"rho": 2.0}, "init_lora_weights": "eva"},
        {"corda_config": {"corda_method": "kpm"}, "init_lora_weights": "corda"},
    ],
    ids=lambda option: next(iter(option)),
)
def test_of_refuses_peft_config_beyond_lora(option):
    config = peft.LoraConfig(target_modules=["q_proj"], **option)
    with pytest.raises(ValueError, match=next(iter(option))):
        LoRAConfig.of(config)


def test_from_dict_refuses_unknown_fields_unless_empty():
    assert LoRAConfig.from_dict({"brand_new": None}) == LoRAConfig()
    for value in (0, 0.0, 1, "on", [0]):
        with pytest.raises(ValueError, match="brand_new"):
            LoRAConfig.from_dict({"brand_new": value})


@pytest.mark.parametrize(
    "config", [{"r": 8}, None, peft.LoHaConfig(target_modules=["q"]), LoRAConfig]
)
def test_of_refuses_objects_that_are_no_config(config):
    with pytest.raises(TypeError, match=r"expected fastlora.LoRAConfig or peft.LoraConfig"):
        LoRAConfig.of(config)


def test_from_dict_refuses_another_kind_of_adapter():
    with pytest.raises(ValueError, match="peft_type: expected LORA, got 'LOHA'"):
        LoRAConfig.from_dict({"peft_type": "LOHA"})


@pytest.mark.parametrize(
    "name, value, kind",
    [
        ("r", 0, ValueError),
        ("r", -1, ValueError),
        ("r", 8.0, TypeError),
        ("r", True, TypeError),
        ("r", None, TypeError),
        ("lora_alpha", float("nan"), ValueError),
        ("lora_alpha", float("-inf"), ValueError),
        ("lora_alpha", 10**400, ValueError),
        ("lora_alpha", "8", TypeError),
        ("lora_dropout", -0.1, ValueError),
        ("lora_dropout", 1.1, ValueError),
        ("lora_dropout", float("nan"), ValueError),
        ("bias", "some", ValueError),
        ("bias", None, ValueError),
        ("use_rslora", 1, TypeError),
        ("lora_bias", None, TypeError),
        *(("init_lora_weights", how, ValueError) for how in refusals.INITS),
        ("init_lora_weights", "pissa_niter_", ValueError),
        ("init_lora_weights", "pissa_niter_-1", ValueError),
        ("init_lora_weights", "pissa_niter_4.5", ValueError),
        ("layers_to_transform", "0", TypeError),
        ("layers_to_transform", True, TypeError),
        ("layers_to_transform", [0, True], TypeError),
        ("layers_to_transform", [0.0], TypeError),
        ("layers_pattern", 3, TypeError),
        ("layers_pattern", "(", ValueError),
        ("layers_pattern", ["h", "["], ValueError),
        ("modules_to_save", "lm_head", TypeError),
        ("modules_to_save", [3], TypeError),
        ("modules_to_save", [""], ValueError),
        ("modules_to_save", ["("], ValueError),
        ("fan_in_fan_out", 1, TypeError),
        ("fan_in_fan_out", None, TypeError),
        ("init_lora_weights", None, ValueError),
        ("target_modules", 3, TypeError),
        ("target_modules", [3], TypeError),
        ("target_modules", "(", ValueError),
        ("exclude_modules", "*", ValueError),
        ("rank_pattern", {"q_proj": 0}, ValueError),
        ("rank_pattern", {"q_proj": 2.5}, TypeError),
        ("rank_pattern", {"(": 2}, ValueError),
        ("alpha_pattern", {"q_proj": float("inf")}, ValueError),
    ],
)
def test_config_refuses_bad_values_by_name(name, value, kind):
    with pytest.raises(kind, match=name):
        LoRAConfig(**{name: value})


@pytest.mark.parametrize(
    "options, named",
    [
        ({"lora_bias": True, "init_lora_weights": "gaussian"}, "lora_bias"),
        ({"lora_bias": True, "init_lora_weights": "pissa"}, "lora_bias"),
        ({"target_modules": "all-linear", "layers_to_transform": 0}, "layers_to_transform"),
        ({"target_modules": ".*q", "layers_to_transform": []}, "layers_to_transform"),
        ({"target_modules": ".*q", "layers_pattern": ""}, "layers_pattern"),
        ({"target_modules": ["q"], "layers_pattern": "layers"}, "layers_pattern"),
        ({"target_modules": ["q"], "layers_pattern": ["layers"]}, "layers_pattern"),
    ],
)
def test_config_refuses_what_peft_refuses(options, named):
    for kind in (LoRAConfig, peft.LoraConfig):
        with pytest.raises(ValueError, match=named):
            kind(**options)


def test_init_lora_weights_accepts_names_in_any_case():
    for name in ("Gaussian", "OLoRA"):
        assert LoRAConfig(init_lora_weights=name) == LoRAConfig(init_lora_weights=name.lower())


def test_with_heads_names_each_head_once():
    config = LoRAConfig(modules_to_save=["score", "classifier", "score"], task_type="SEQ_CLS")
    assert config.modules_to_save == ("score", "classifier")
    assert config.with_heads() == config
    assert LoRAConfig(task_type="TOKEN_CLS").with_heads().modules_to_save == (
        "classifier",
        "score",
    )
    assert LoRAConfig(task_type="QUESTION_ANS").with_heads().modules_to_save == ("qa_outputs",)
    assert LoRAConfig(task_type="CAUSAL_LM").with_heads().modules_to_save is None


def test_config_is_frozen_and_copies_its_arguments():
    names, ranks = ["q_proj"], {"q_proj": 2}
    config = LoRAConfig(target_modules=names, rank_pattern=ranks)
    names.append("v_proj")
    ranks["q_proj"] = 4
    assert config == LoRAConfig(target_modules=["q_proj"], rank_pattern={"q_proj": 2})
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.r = 2


names = st.lists(st.sampled_from(["a", "b", "ab", "0", "1"]), min_size=1, max_size=4).map(".".join)
