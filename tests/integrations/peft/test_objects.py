"""A patched PEFT model is saved, copied, unloaded and unpatched like the unpatched one."""

from __future__ import annotations

import copy
import io
import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

from peft.utils import hotswap  # noqa: E402

import fastlora  # noqa: E402
from tests.support.models import assert_agree, llama, quiet  # noqa: E402
from tests.support.patched import (  # noqa: E402
    KINDS,
    assert_same,
    config,
    inject_adapter,
    inputs,
    pair,
    peft_model,
    run,
    train_adapters,
)

pytestmark = quiet


@pytest.mark.parametrize("kind", KINDS)
def test_unloaded_model_matches_that_of_peft(kind):
    given = inputs(kind)
    plain, patched = pair(kind)
    before = run(patched, given)
    wanted, found = plain.merge_and_unload(), patched.merge_and_unload()
    assert repr(wanted) == repr(found)
    assert_agree(run(found, given), run(wanted, given))
    assert_agree(run(found, given), before)
    plain, patched = pair(kind)
    assert_agree(run(patched.unload(), given), run(plain.unload(), given))


@pytest.mark.parametrize("kind", KINDS)
def test_saved_files_equal_those_of_peft(kind, tmp_path):
    given = inputs(kind)
    plain, patched = pair(kind)
    for name, model in (("plain", plain), ("patched", patched)):
        model.save_pretrained(tmp_path / name)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "plain" / file).read_bytes() == (
            tmp_path / "patched" / file
        ).read_bytes()

    def act(model):
        model.load_adapter(tmp_path / "plain", "again", low_cpu_mem_usage=True)
        model.set_adapter("again")
        return [run(model, given)]

    assert_same(plain, patched, act)
    base = peft_model(kind).unload()
    fresh = peft.PeftModel.from_pretrained(base, tmp_path / "patched")
    fastlora.patch_peft(fresh)
    assert_agree(run(fresh.eval(), given), run(plain, given))


@pytest.mark.parametrize("kind", ["mlp", "llama"])
def test_report_states_configs_outdated_by_hot_swap(kind, tmp_path):
    """The report tells ranks and scalings that run; PEFT's save_pretrained, that they are lost."""
    given = inputs(kind)
    other = peft_model(kind, r=8, lora_alpha=32)
    other.save_pretrained(tmp_path / "other")
    _, patched = pair(kind)
    names = list(fastlora.report(patched).replaced)
    assert set(fastlora.report(patched).replaced.values()) == {5}
    assert not fastlora.report(patched).misstated
    hotswap.hotswap_adapter(patched, tmp_path / "other", "default", torch_device="cpu")
    assert_agree(run(patched, given), run(other, given))
    found = fastlora.report(patched)
    assert found.replaced == dict.fromkeys(names, 8)
    says = "adapter 'default' runs with r=8 and a scaling of 4, its config says r=5 and 1.4"
    assert found.misstated == dict.fromkeys(names, says)
    more = f" and {len(names) - 1} more"
    assert f"not as PEFT would save it: {names[0]}{more}: {says}" in str(found)
    with pytest.warns(UserWarning, match=f"{more}: {says}.*save_pretrained writes what the config"):
        patched.save_pretrained(tmp_path / "lost")
    patched.peft_config["default"].r, patched.peft_config["default"].lora_alpha = 8, 32
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*save_pretrained writes")
        patched.save_pretrained(tmp_path / "told")
    assert not fastlora.report(patched).misstated
    again = peft.PeftModel.from_pretrained(peft_model(kind).unload(), tmp_path / "told").eval()
    assert_agree(run(again, given), run(other, given))


def test_report_states_only_differences_from_config():
    """By layer and adapter, patterns and tensors of scalings counted; padded ranks are ranks."""
    options = {"rank_pattern": {"^lin0": 3}, "alpha_pattern": {"lin1": 20}, "use_rslora": True}
    _, patched = pair("mlp", **options)
    patched.add_adapter("more", config("mlp", r=2))
    assert not fastlora.report(patched).misstated
    hotswap._convert_scalings_to_tensor(patched)
    assert not fastlora.report(patched).misstated
    layer = patched.get_submodule("base_model.model.lin1")
    layer.set_scale("more", 2.0)
    assert fastlora.report(patched).misstated == {
        "base_model.model.lin1": "adapter 'more' runs with r=2 and a scaling of 7, its config says "
        "r=2 and 3.5"
    }
    layer.set_scale("more", 1.0)
    hotswap._pad_lora_weights(patched, 6)
    assert fastlora.report(patched).replaced == {
        "base_model.model.lin0": 6, "base_model.model.lin1": 6
    }  # fmt: skip
    assert "runs with r=6" in fastlora.report(patched).misstated["base_model.model.lin0"]


def test_copied_and_pickled_models_stay_patched():
    given = inputs("mlp")
    plain, patched = pair("mlp")
    written = io.BytesIO()
    torch.save(patched, written)
    written.seek(0)
    others = [
        copy.deepcopy(patched),
        pickle.loads(pickle.dumps(patched)),
        torch.load(written, weights_only=False),
    ]
    for other in others:
        assert len(fastlora.report(other).replaced) == 2
        assert_same(
            copy.deepcopy(plain), other, lambda m: [run(m, given), *train_adapters(m, given)]
        )


def test_unpatch_peft_restores_classes_of_peft():
    given = inputs("mlp")
    plain, patched = pair("mlp")
    want = run(plain, given)
    fastlora.unpatch_peft(patched)
    assert torch.equal(run(patched, given), want)
    assert [type(m) for m in patched.modules()] == [type(m) for m in plain.modules()]
    assert fastlora.report(patched).replaced == {}
    with pytest.raises(ValueError, match="peft_model: expected one that patch_peft has patched"):
        fastlora.unpatch_peft(patched)


def test_unpatch_peft_works_under_replaced_forward():
    """As accelerate's hooks do: what they call stays good."""
    given = inputs("mlp")
    plain, patched = pair("mlp")
    layer = patched.base_model.model.lin0
    layer.forward = lambda x, _forward=layer.forward: _forward(x)
    fastlora.unpatch_peft(patched)
    assert_same(plain, patched, lambda m: [run(m, given)])
    for model in (plain, patched):
        model.merge_adapter()
    assert_same(plain, patched, lambda m: [run(m, given)])


def test_patched_model_keeps_repr_and_classes():
    plain, patched = pair("llama")
    assert repr(patched) == repr(plain)
    layer = patched.base_model.model.model.layers[0].self_attn.q_proj
    assert isinstance(layer, peft.tuners.lora.Linear)
    assert repr(layer).startswith("lora.Linear(")
    assert str(peft.get_layer_status(patched)) == str(peft.get_layer_status(plain))


@pytest.mark.full  # pickles in one process are quick
def test_another_process_loads_pickled_patched_model(tmp_path):
    model = llama()
    inject_adapter(model, config("llama"))
    fastlora.patch_peft(model)
    torch.save(model, tmp_path / "model.pt")
    code = (
        "import torch, fastlora; model = torch.load('model.pt', weights_only=False); "
        "print(len(fastlora.report(model).replaced))"
    )
    path = {**os.environ, "PYTHONPATH": str(Path(fastlora.__file__).parent.parent)}
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=path, capture_output=True, text=True
    )
    assert run.stdout.strip() == "6", run.stderr
