"""A patched PEFT model merges in place and unmerges every bit."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

import fastlora  # noqa: E402
from fastlora.integrations.peft.merging import Merging  # noqa: E402
from tests.support.helpers import same_bits  # noqa: E402
from tests.support.models import assert_agree, error, quiet  # noqa: E402
from tests.support.patched import config, fill_adapters, inputs, inputs_of_ones, pair, run  # noqa: E402

pytestmark = quiet


def to_double(given):
    return {name: t.double() if t.is_floating_point() else t for name, t in given.items()}


def base_state(model):
    """Base weights and biases by name, copied."""
    return {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" not in n}


def assert_bits(model, before):
    after = base_state(model)
    assert all(same_bits(after[name], before[name]) for name in before)


@pytest.mark.parametrize("kind", ["mlp", "gpt2", "llama"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unmerge_restores_every_bit(kind, dtype):
    torch.manual_seed(0)  # the bound below is of one draw of rounding errors beside another
    plain, patched = pair(kind, dtype)
    for model in (plain, patched):
        model.add_adapter("other", config(kind, r=3, lora_alpha=40))
        fill_adapters(model).eval()
        model.base_model.set_adapter(["default", "other"])
    before = base_state(patched)
    where = {name: p.data_ptr() for name, p in patched.named_parameters()}
    given = inputs(kind, dtype=dtype)
    with torch.no_grad():
        exact = run(copy.deepcopy(patched).double(), to_double(given))
    for cycle in range(3):
        for model in (plain, patched):
            model.merge_adapter(safe_merge=True)
        with torch.no_grad():
            found = [error(run(model, given), exact) for model in (patched, plain)]
        assert cycle or found[0] <= 2 * found[1] + 1e-5
        for model in (plain, patched):
            model.unmerge_adapter()
    assert {name: p.data_ptr() for name, p in patched.named_parameters()} == where
    assert_bits(patched, before)
    drifted = [not same_bits(p, before[n]) for n, p in base_state(plain).items()]
    assert any(drifted)  # PEFT's, by which this test would see a merge that is not exact


def test_unmerge_restores_biases_of_the_base():
    plain, patched = pair("mlp", lora_bias=True, target_modules=["lin0", "head"])
    before = base_state(patched)
    for model in (plain, patched):
        model.merge_adapter()
    assert_agree(run(patched, inputs_of_ones()), run(plain, inputs_of_ones()))
    assert not same_bits(
        patched.base_model.model.lin0.base_layer.bias,
        before["base_model.model.lin0.base_layer.bias"],
    )
    patched.unmerge_adapter()
    assert_bits(patched, before)


def test_merge_refuses_lora_bias_without_base_bias():
    for model in pair("mlp", lora_bias=True, target_modules=["lin1"]):
        with pytest.raises(RuntimeError, match="base layer has no bias"):
            model.merge_adapter()


def test_merge_refuses_adapters_that_are_not_finite():
    patched = pair("mlp")[1]
    with torch.no_grad():
        patched.base_model.model.lin0.lora_B["default"].weight[0, 0] = torch.nan
    before = base_state(patched)
    with pytest.raises(ValueError, match=r"adapter 'default': .*finite"):
        patched.merge_adapter()
    assert_bits(patched, before)
    patched = pair("mlp", lora_bias=True, target_modules=["lin0"])[1]
    with torch.no_grad():
        patched.base_model.model.lin0.lora_B["default"].bias[0] = torch.inf
    before = base_state(patched)
    with pytest.raises(ValueError, match="adapter 'default': the merged bias would not be finite"):
        patched.merge_adapter()
    assert_bits(patched, before)


def test_merge_restores_bits_of_layers_with_hooks():
    """PEFT reads the matrices too when it merges."""
    patched = pair("mlp", torch.bfloat16)[1]
    before = base_state(patched)
    patched.base_model.model.lin0.lora_A["default"].register_forward_hook(lambda *_: None)
    patched.merge_adapter()
    patched.unmerge_adapter()
    assert_bits(patched, before)


def test_merge_and_unload_leaves_no_receipts():
    patched = pair("mlp")[1]
    layers = [m for m in patched.modules() if isinstance(m, Merging)]
    patched.merge_and_unload()
    assert len(layers) == 2
    assert all(layer.merged and not vars(layer).get("_receipts") for layer in layers)


def test_unmerge_of_edited_weight_subtracts_and_warns():
    """PEFT subtracts what it can; so does a patched layer, and says so."""
    plain, patched = pair("mlp", lora_bias=True, target_modules=["lin0"])
    for edit in ("weight", "bias"):
        for model in (plain, patched):
            model.merge_adapter()
            with torch.no_grad():
                getattr(model.base_model.model.lin0.base_layer, edit).add_(1)
        plain.unmerge_adapter()
        with pytest.warns(UserWarning, match="adapter 'default' is subtracted, as PEFT does"):
            patched.unmerge_adapter()
        for name, value in base_state(plain).items():
            assert_agree(base_state(patched)[name], value)


def test_unmerge_restores_base_when_adapter_has_changed():
    """The base comes back all the same: the receipt knows what was merged."""
    patched = pair("mlp")[1]
    before = base_state(patched)
    patched.merge_adapter()
    with torch.no_grad():
        for name, p in patched.named_parameters():
            if "lora_" in name:
                p.mul_(2)
    patched.unmerge_adapter()
    assert_bits(patched, before)


def test_failed_unmerge_leaves_other_adapters_merged():
    found = []
    for model in pair("mlp"):
        model.add_adapter("other", config("mlp", r=3))
        fill_adapters(model).eval().base_model.set_adapter(["default", "other"])
        model.merge_adapter()
        layer = model.base_model.model.lin0
        with torch.no_grad():
            layer.base_layer.weight.add_(1)
        layer.lora_B["other"].weight.data = torch.zeros(7, 3)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(RuntimeError, match="size of tensor"):
                layer.unmerge()
        found.append(layer.merged_adapters)
    assert found == [["default"], ["default"]]


def test_copy_of_merged_model_unmerges_every_bit():
    patched = pair("mlp")[1]
    before = base_state(patched)
    patched.merge_adapter()
    other = copy.deepcopy(patched)
    other.unmerge_adapter()
    assert_bits(other, before)
    assert patched.base_model.model.lin0.merged


def test_model_patched_or_unpatched_while_merged_unmerges():
    plain, patched = pair("mlp")
    before = base_state(patched)
    plain.merge_adapter()
    fastlora.patch_peft(plain)
    patched.merge_adapter()
    fastlora.unpatch_peft(patched)
    # A patched model holds what follows its rows, once, and nothing else.
    own = [vars(m).keys() - {"_fastlora_watch"} for m in plain.modules()]
    assert [vars(m).keys() for m in patched.modules()] == own
    for model in (plain, patched):
        model.unmerge_adapter()
        for name, value in base_state(model).items():
            assert_agree(value, before[name])
        with pytest.warns(UserWarning, match="Already unmerged"):
            model.base_model.model.lin0.unmerge()


def test_merging_twice_warns_and_merges_once():
    patched = pair("mlp")[1]
    patched.merge_adapter()
    with pytest.warns(UserWarning, match="All adapters are already merged"):
        patched.merge_adapter()
    assert patched.base_model.model.lin0.merged_adapters == ["default"]


def test_dora_adapter_is_merged_by_peft():
    plain, patched = pair("mlp")
    for model in (plain, patched):
        model.add_adapter("dora", config("mlp", use_dora=True))
        fill_adapters(model).eval()
        model.base_model.set_adapter(["default", "dora"])
    before = run(patched, inputs_of_ones())
    for model in (plain, patched):
        model.merge_adapter(["default"])
        model.merge_adapter(["dora"])
    assert_agree(run(patched, inputs_of_ones()), run(plain, inputs_of_ones()))
    plain.unmerge_adapter()
    # DoRA's own unmerging rounds, after which the weight is not quite as it was left.
    with pytest.warns(UserWarning, match="adapter 'default' is subtracted, as PEFT does"):
        patched.unmerge_adapter()
    assert_agree(run(patched, inputs_of_ones()), before)
