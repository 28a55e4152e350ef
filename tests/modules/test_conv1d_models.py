"""Transformers models of Conv1D layers: files, merging, serving, training."""

from __future__ import annotations

import os
import warnings

import peft
import pytest
import torch
from peft.tuners.lora.layer import Linear as PeftLinear
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import fastlora
from fastlora import FastLoRAConv1D, LoRAConfig
from tests.support import forks
from tests.support.helpers import same_bits
from tests.support.models import (
    TOLERANCE,
    assert_agree,
    error,
    gpt2,
    logits,
    quiet,
    randomise_lora,
    tokens,
)
from tests.support.trained_models import model_of_several_adapters

pytestmark = quiet


CONV = LoRAConfig(r=4, target_modules="all-linear", fan_in_fan_out=True)


def base(dtype: torch.dtype = torch.float32) -> Conv1D:
    """12 to 20, with a weight and a bias that matter."""
    conv = Conv1D(20, 12)
    nn.init.normal_(conv.weight)
    nn.init.normal_(conv.bias)
    return conv.to(dtype)


def layer(dtype: torch.dtype = torch.float32, **options) -> FastLoRAConv1D:
    return randomise_lora(FastLoRAConv1D.from_conv1d(base(dtype), r=4, **options), 2.0)


def test_conv1d_layer_runs_without_transformers():
    code = (
        "import sys, torch, fastlora\n"
        "layer = fastlora.FastLoRAConv1D(6, 4, r=2)\n"
        "assert layer(torch.randn(3, 4)).shape == (3, 6)\n"
        "assert 'transformers' not in sys.modules\n"
    )
    run = forks.run(code, env=dict(os.environ))
    assert run.returncode == 0, run.stderr


def test_all_linear_takes_same_layers_as_peft():
    theirs = peft.inject_adapter_in_model(peft.LoraConfig(target_modules="all-linear"), gpt2())
    wanted = {n for n, m in theirs.named_modules() if isinstance(m, PeftLinear)}
    model = fastlora.replace_linear(gpt2(), CONV)
    assert set(fastlora.report(model).replaced) == wanted
    assert {type(model.get_submodule(name)) for name in wanted} == {FastLoRAConv1D}
    assert fastlora.report(model).skipped.keys() == {"lm_head"}


CASES = {
    "all": {"target_modules": "all-linear"},
    "biases": {"target_modules": ["c_attn", "c_fc"], "bias": "lora_only", "lora_bias": True},
    "all biases": {"target_modules": ["c_proj"], "bias": "all"},
    "layer": {"target_modules": ["c_attn"], "layers_to_transform": 0, "layers_pattern": "h"},
    "head": {"target_modules": ["c_attn", "lm_head"], "r": 3},
    "ranks": {"target_modules": "all-linear", "rank_pattern": {"c_proj": 2}, "use_rslora": True},
}


def randomise_every_lora_b(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad and name.endswith(".bias") and "lora_" not in name:
                p.add_(torch.randn(p.shape) * 0.1)
    return randomise_lora(model).eval()


@pytest.mark.parametrize("name", CASES)
def test_gpt2_adapters_load_in_both_libraries(tmp_path, name):
    options, ids = CASES[name], tokens(2, 9)
    theirs = randomise_every_lora_b(peft.get_peft_model(gpt2(), peft.LoraConfig(**options)))
    theirs.save_pretrained(str(tmp_path / "peft"), save_embedding_layers=False)
    ours = fastlora.load_adapter(gpt2(), tmp_path / "peft")
    assert_agree(logits(ours, ids), logits(theirs, ids), logits(gpt2(), ids))
    fastlora.save_adapter(ours, tmp_path / "ours")
    files = [load_file(tmp_path / n / "adapter_model.safetensors") for n in ("peft", "ours")]
    assert files[0].keys() == files[1].keys()
    assert all(same_bits(files[0][key], files[1][key]) for key in files[0])
    saved = [peft.LoraConfig.from_pretrained(str(tmp_path / n)) for n in ("peft", "ours")]
    assert saved[0].fan_in_fan_out == saved[1].fan_in_fan_out
    again = peft.PeftModel.from_pretrained(gpt2(), str(tmp_path / "ours")).eval()
    assert_agree(logits(again, ids), logits(theirs, ids))


def test_gpt2_merges_and_unmerges_as_peft(tmp_path):
    theirs = randomise_every_lora_b(
        peft.get_peft_model(gpt2(), peft.LoraConfig(target_modules="all-linear"))
    )
    theirs.save_pretrained(str(tmp_path))
    ours, plain, ids = fastlora.load_adapter(gpt2(), tmp_path), gpt2(), tokens(2, 9)
    fastlora.merge_adapter(ours)
    assert len(fastlora.report(ours).merged) == 8
    assert_agree(logits(ours, ids), logits(theirs, ids), logits(plain, ids))
    with fastlora.disable_adapter(ours):
        assert_agree(logits(ours, ids), logits(plain, ids))
    fastlora.unmerge_adapter(ours)
    for (_, a), (_, b) in zip(
        plain.named_parameters(),
        ((n, p) for n, p in ours.named_parameters() if "lora" not in n),
        strict=True,
    ):
        assert same_bits(a, b)
    fastlora.merge_and_unload(ours)
    assert_agree(logits(ours, ids), logits(theirs.merge_and_unload(), ids))
    assert ours.state_dict().keys() == plain.state_dict().keys()
    for name, module in plain.named_modules():
        other = ours.get_submodule(name)
        assert (type(other), vars(other).keys()) == (type(module), vars(module).keys())


def test_swap_adapter_works_on_merged_gpt2(tmp_path):
    ids, folders = tokens(2, 5), [tmp_path / name for name in "ab"]
    for folder in folders:
        fastlora.save_adapter(randomise_lora(fastlora.replace_linear(gpt2(), CONV)), folder)
    model = fastlora.merge_adapter(fastlora.load_adapter(gpt2(), folders[0]))
    before = logits(model, ids)
    fastlora.swap_adapter(model, folders[1])
    want = fastlora.merge_adapter(fastlora.load_adapter(gpt2(), folders[1]))
    assert same_bits(logits(model, ids), logits(want, ids))
    assert error(before, logits(model, ids)) > 0.1


@pytest.mark.parametrize(
    "given, targets, warned",
    [
        (False, "all-linear", True),
        (True, "all-linear", False),
        (True, ["lm_head"], True),
        (False, ["lm_head"], False),
        (False, ["lm_head", "c_fc"], False),  # it holds for one of them
        (True, ["lm_head", "c_fc"], False),
    ],
)
def test_fan_in_fan_out_follows_layer_with_warning(tmp_path, given, targets, warned):
    """PEFT warns and corrects, too; what it saves is how the last of its layers lies."""
    config = LoRAConfig(target_modules=targets, fan_in_fan_out=given)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = fastlora.replace_linear(gpt2(), config)
    assert [w.filename for w in caught if "fan_in_fan_out" in str(w.message)] == [__file__] * warned
    fastlora.save_adapter(model, tmp_path)
    theirs = peft.get_peft_model(
        gpt2(), peft.LoraConfig(target_modules=targets, fan_in_fan_out=given)
    )
    saved = peft.LoraConfig.from_pretrained(str(tmp_path)).fan_in_fan_out
    assert saved == theirs.peft_config["default"].fan_in_fan_out


def test_gpt2_serves_many_adapters(tmp_path):
    ids, want = tokens(3, 7), []
    server = fastlora.MultiLoRAModel(gpt2(), max_adapters=2, max_rank=4)
    for name in "ab":
        model = randomise_lora(fastlora.replace_linear(gpt2(), CONV))
        fastlora.save_adapter(model, tmp_path / name)
        server.load_adapter(tmp_path / name, name)
        want.append(logits(model, ids))
    got = server(ids, adapter_names=["b", None, "a"]).logits
    for row, wanted in enumerate((want[1], logits(gpt2(), ids), want[0])):
        assert error(got[row], wanted[row]) <= TOLERANCE[torch.float32]
    assert server.model.state_dict().keys() == gpt2().state_dict().keys()


def test_gpt2_trains_several_adapters_together(tmp_path):
    model, ids = model_of_several_adapters(gpt2(), CONV), tokens(2, 5)
    fastlora.save_adapter(model, tmp_path, adapter_name="ben")
    single = fastlora.load_adapter(gpt2(), tmp_path, is_trainable=True)

    def loss(of: nn.Module) -> Tensor:
        return of(input_ids=ids, labels=ids).loss

    with fastlora.use_adapters(model, ["ben", "ben"]):
        loss(model).backward()
    loss(single).backward()
    for one, other in zip(
        fastlora.adapter_parameters(model, "ben"),
        (p for p in single.parameters() if p.requires_grad),
        strict=True,
    ):
        assert error(one.grad, other.grad) <= 10 * TOLERANCE[torch.float32]
