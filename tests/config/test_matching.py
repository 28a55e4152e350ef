"""The layers, ranks and alphas that a config names are those that PEFT reads."""

from __future__ import annotations

import json
import re

import peft
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

import fastlora
from fastlora import LoRAConfig
from fastlora.config import matching
from fastlora.modules.layer import find_lora_layers
from tests.support.models import llama


@pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match")
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "down_proj"]},
        {"target_modules": {"q_proj"}},
        {"target_modules": ["q_proj", "proj"]},  # a name ends at a dot: o_proj is not named
        {"target_modules": ["self_attn.q_proj", "model.layers.1.mlp.up_proj"]},
        {"target_modules": r".*\.(q|v)_proj"},
        {"target_modules": r"model\.layers\.0\..*_proj"},
        {"target_modules": "all-linear"},
        {"target_modules": "ALL-linear"},
        {"target_modules": ["lm_head", "q_proj"]},
        {"target_modules": "all-linear", "exclude_modules": ["q_proj", "layers.1.mlp.up_proj"]},
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*layers\.0.*"},
        {"target_modules": ["q_proj"], "exclude_modules": []},
        {"target_modules": ["q_proj", "k_proj"], "rank_pattern": {"q_proj": 2}},
        {"target_modules": ["q_proj"], "rank_pattern": {r"layers\.1\.self_attn\.q_proj": 3}},
        {"target_modules": ["q_proj"], "rank_pattern": {"^model.layers.0.self_attn.q_proj": 3}},
        {"target_modules": ["q_proj"], "rank_pattern": {"^q_proj": 3, "_proj": 5}},
        {"target_modules": ["q_proj", "k_proj"], "rank_pattern": {r".*q_proj": 3, "q_proj": 5}},
        {"target_modules": "all-linear", "alpha_pattern": {"mlp.*": 32, "q_proj|k_proj": 1}},
        {"target_modules": ["q_proj"], "rank_pattern": {"q_proj": 2}, "use_rslora": True},
        {"target_modules": ["q_proj"], "layers_to_transform": 0},  # equals False: it is a layer
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
        {"target_modules": ["q_proj"], "layers_to_transform": [1, 0, 7]},
        {"target_modules": ["q_proj"], "layers_to_transform": []},
        {"target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": "layers"},
        {"target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": ["h", "l.*s"]},
        {
            "target_modules": ["model.layers.0.self_attn.q_proj", "v_proj"],
            "layers_to_transform": 1,  # a full name stands for itself
        },
        {"target_modules": ["q_proj", "up_proj"], "modules_to_save": ["self_attn"]},
    ],
    ids=str,
)
def test_replace_linear_has_layers_and_scalings_of_peft(options):
    """PEFT is asked by what it does to a model, not by its helpers."""
    options = {"r": 8, "lora_alpha": 12} | options
    theirs = peft.inject_adapter_in_model(peft.LoraConfig(**options), llama())
    wanted = {
        name: (layer.r["default"], layer.scaling["default"])
        for name, layer in theirs.named_modules()
        if isinstance(layer, peft.tuners.lora.LoraLayer)
    }
    ours = fastlora.replace_linear(llama(), peft.LoraConfig(**options))
    assert {n: (layer.r, layer.scaling) for n, layer in find_lora_layers(ours)} == wanted
    assert wanted


FAMILIES = {
    "llama": ([f"model.layers.{i}.{m}" for i in range(12) for m in ("self_attn.q", "mlp.up")]),
    "gpt2": [f"transformer.h.{i}.{m}" for i in range(3) for m in ("attn.c_attn", "mlp.c_fc")],
    "moe": [f"model.layers.{i}.experts.{j}.up" for i in range(2) for j in range(3)],
    "bare": [f"{i}.{m}" for i in range(3) for m in ("q", "layers.1.q")],
    "towers": [f"{t}.layers.{i}.q" for t in ("encoder", "decoder.h.1", "1") for i in (0, 1, 10)],
}


NAMES = sorted({name for names in FAMILIES.values() for name in names} | {"lm_head", "layers.0.q"})


ENDS = sorted({name.rpartition(".")[2] for name in NAMES})


index = st.integers(-1, 11)


@given(
    targets=st.lists(st.sampled_from([*ENDS, *NAMES]), max_size=4),
    layers=st.one_of(st.none(), index, st.lists(index, max_size=4)),
    pattern=st.one_of(
        st.none(),
        st.sampled_from(["", "layers", "h", r"\w+", "experts", "decoder.h"]),
        st.lists(st.sampled_from(["layers", "h", "experts", "", "l|h"]), max_size=3),
    ),
    whole=st.lists(
        st.sampled_from(["q", "mlp", "lm_head", "layers.1", "head", "h.1.*"]), max_size=2
    ),
    excluded=st.lists(st.sampled_from([*ENDS, "model.layers.1.mlp.up"]), max_size=1),
)
@example(targets=["q"], layers=0, pattern=["l|h"], whole=[], excluded=[])
@example(targets=["q"], layers=[0, 1], pattern=["l|h", "layers"], whole=[], excluded=[])
def test_targets_choose_same_layers_as_peft(targets, layers, pattern, whole, excluded):
    options = {
        "target_modules": targets,
        "layers_to_transform": layers,
        "layers_pattern": None if layers is None else pattern,
        "modules_to_save": whole or None,
        "exclude_modules": excluded or None,
    }
    ours, theirs = LoRAConfig(**options), peft.LoraConfig(**options)
    # As peft.LoraConfig.from_pretrained reads it, and as we write it.
    again = LoRAConfig.from_dict(json.loads(json.dumps(ours.to_dict())))
    for name in NAMES:
        wanted = bool(check_target_module_exists(theirs, name))
        assert ours.names(name) == again.names(name) == wanted, name


names = st.lists(st.sampled_from(["a", "b", "ab", "0", "1"]), min_size=1, max_size=4).map(".".join)


patterns = st.one_of(
    names, st.sampled_from([r".*\.a", r"a.*", r"^a\.b", r"(a|b)\.\d", r".*", "b$"])
)


@given(name=names, target=st.one_of(patterns, st.lists(names)), ranks=st.lists(patterns))
def test_every_name_matches_as_in_peft(name, target, ranks):
    ranks = {pattern: i + 1 for i, pattern in enumerate(ranks)}
    ours = LoRAConfig(target_modules=target, rank_pattern=ranks, r=99)
    theirs = peft.LoraConfig(target_modules=target, rank_pattern=ranks)
    assert ours.targets(name) == bool(check_target_module_exists(theirs, name))
    assert ours.rank_of(name) == ranks.get(get_pattern_key(ranks, name), 99)
    excluded = LoRAConfig(exclude_modules=target).excludes(name)
    wanted = re.fullmatch(target, name) if isinstance(target, str) else ours.targets(name)
    assert excluded == bool(wanted)


@given(
    known=st.lists(names, max_size=6, unique=True),
    ranks=st.dictionaries(patterns, st.integers(1, 3), max_size=5),
    order=st.randoms(use_true_random=False),
    values=st.lists(st.integers(1, 4), min_size=6, max_size=6),
)
def test_resolved_patterns_mean_same_in_any_order(known, ranks, order, values):
    """By PEFT's matching; what keys do not contradict stays, what tensors say counts."""
    found = matching.resolve_overlaps(ranks, known)
    keys = list(found)
    order.shuffle(keys)
    for name in known:
        want = ranks.get(get_pattern_key(ranks, name), 99)
        for shuffled in (keys, sorted(keys)):
            again = {key: found[key] for key in shuffled}
            assert again.get(get_pattern_key(again, name), 99) == want
    overlaps = matching.find_overlaps(ranks, known)
    assert overlaps or found == ranks
    told = dict(zip(known, values, strict=False))
    said = matching.resolve_overlaps(ranks, known, told)
    for name, of in overlaps.items():
        want = told[name] if told[name] in of.values() else next(iter(of.values()))
        assert said.get(get_pattern_key(sorted(said), name)) == want
