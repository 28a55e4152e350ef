"""A patched PEFT model as an object: saved, copied, unloaded, unpatched, and PEFT's by name."""

from __future__ import annotations

import copy
import io
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")


import fastlora  # noqa: E402
from tests.models import assert_agree, llama, quiet  # noqa: E402
from tests.patched import (  # noqa: E402
    KINDS,
    assert_same,
    config,
    injected,
    inputs,
    pair,
    peft_model,
    run,
    trained,
)

pytestmark = quiet


@pytest.mark.parametrize("kind", KINDS)
def test_unloaded(kind):
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
def test_saved_and_loaded(kind, tmp_path):
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


def test_copied_and_pickled():
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
        assert_same(copy.deepcopy(plain), other, lambda m: [run(m, given), *trained(m, given)])


def test_unpatched():
    given = inputs("mlp")
    plain, patched = pair("mlp")
    want = run(plain, given)
    fastlora.unpatch_peft(patched)
    assert torch.equal(run(patched, given), want)
    assert [type(m) for m in patched.modules()] == [type(m) for m in plain.modules()]
    assert fastlora.report(patched).replaced == {}
    with pytest.raises(ValueError, match="peft_model: expected one that patch_peft has patched"):
        fastlora.unpatch_peft(patched)


def test_unpatched_under_a_hook_that_holds_the_forward():
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


def test_repr_and_class_are_pefts():
    plain, patched = pair("llama")
    assert repr(patched) == repr(plain)
    layer = patched.base_model.model.model.layers[0].self_attn.q_proj
    assert isinstance(layer, peft.tuners.lora.Linear)
    assert repr(layer).startswith("lora.Linear(")
    assert str(peft.get_layer_status(patched)) == str(peft.get_layer_status(plain))


def test_another_process_reads_the_pickle_and_reports(tmp_path):
    model = llama()
    injected(model, config("llama"))
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
