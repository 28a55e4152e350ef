"""Models pickled by version 0.1.0 load with the classes of today."""

import io
import pickle
import pickletools
import subprocess
import sys

import pytest
import torch
from torch import nn

import fastlora
from fastlora.functional import group_rows, merge_
from fastlora.moved import MOVED
from tests.support.models import randomise_lora

# Where a class of today was in 0.1.0, as pickles have it: "module name".
OLD = {
    f"{place.partition(':')[0]} {place.partition(':')[2] or name}": f"{module} {name}"
    for module, classes in MOVED.items()
    for name, place in classes.items()
} | {"fastlora.modules.linear FastLoRALinear": "fastlora.modules FastLoRALinear"}


def pickle_as_old(value: object) -> tuple[bytes, set[str]]:
    """A pickle of value that names 0.1.0's classes, and which ones."""
    data, used = pickle.dumps(value, protocol=2), set()
    for op, argument, _ in pickletools.genops(data):
        if op.name == "GLOBAL" and argument in OLD:
            used.add(OLD[argument])
    for today in sorted(OLD, key=len, reverse=True):
        new, old = (f"c{name.replace(' ', chr(10))}\n".encode() for name in (today, OLD[today]))
        data = data.replace(new, old)
    return data, used


def trained_model(**options):
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    config = fastlora.LoRAConfig(r=2, target_modules=["0"], **options)
    return randomise_lora(fastlora.replace_linear(net, config))


def test_old_pickle_of_trained_model_loads():
    model, x = trained_model(modules_to_save=["2"]), torch.randn(4, 8)
    y = model(x)
    data, used = pickle_as_old(model)
    assert {"fastlora.modules FastLoRALinear", "fastlora.injection Injection"} <= used
    assert "fastlora.saved_modules Saved" in used
    assert torch.equal(pickle.loads(data)(x), y)


def test_old_pickle_of_merged_model_unmerges():
    model = trained_model().eval()
    before = model[0].weight.clone()
    data, used = pickle_as_old(fastlora.merge_adapter(model) or model)
    assert "fastlora.receipt MergeReceipt" in used
    loaded = pickle.loads(data)
    fastlora.unmerge_adapter(loaded)
    assert torch.equal(loaded[0].weight, before)


def test_old_pickle_of_several_adapters_loads():
    net, x = nn.Sequential(nn.Linear(8, 8), nn.Tanh()), torch.randn(4, 8)
    config = fastlora.LoRAConfig(r=2, target_modules=["0"])
    model = randomise_lora(fastlora.replace_linear(net, config, adapter_names=["a", "b"]))

    def run(model):
        with fastlora.use_adapters(model, ["a", "b", None, "a"]):
            return model(x)

    data, used = pickle_as_old(model)
    assert {"fastlora.multi_modules TrainingRows", "fastlora.rows.entry Watch"} <= used
    loaded = pickle.loads(data)
    assert torch.equal(run(loaded), run(model))


def test_watch_accepts_state_of_version_0_1_0():
    watch = pickle.loads(pickle.dumps(fastlora.rows.watch.Watch(nn.Linear(2, 2), None)))
    state = vars(watch) | {"verdicts": {}, "lengths": {}, "_trusted": None, "_settled": True}
    watch.__setstate__(state)
    assert watch.verdicts.by_key == {}


@pytest.mark.parametrize("value", ["groups", "receipt"])
def test_old_pickles_of_function_values_load(value):
    made = group_rows(torch.tensor([1, 0, 1]), 2)
    if value == "receipt":
        made = merge_(torch.randn(8, 8), [(torch.randn(2, 8), torch.randn(8, 2), 1.0)])
    data, used = pickle_as_old(made)
    assert used
    assert type(pickle.loads(data)) is type(made)


def test_every_old_module_name_can_be_imported():
    lines = [f"from {m} import {', '.join(names)}" for m, names in MOVED.items()]
    pytest.importorskip("peft")
    done = subprocess.run([sys.executable, "-c", "import fastlora\n" + "\n".join(lines)])
    assert done.returncode == 0


def test_loaded_old_pickle_is_saved_under_new_paths():
    data, _ = pickle_as_old(trained_model())
    buffer = io.BytesIO()
    torch.save(pickle.loads(data), buffer)
    assert b"fastlora.injection" not in buffer.getvalue()
    assert b"fastlora.model.record" in buffer.getvalue()
