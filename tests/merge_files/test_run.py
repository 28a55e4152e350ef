"""Merging adapters into the files of a model gives the numbers of PEFT."""

from __future__ import annotations

import json
import os

import pytest
import torch
import transformers
from torch import Tensor

from fastlora import functional as F
from fastlora.functional.fidelity import FidelityWarning, measure
from fastlora.merge_files import merge_folder, shards
from tests.support.checkpoints import (
    CONFIG,
    INDEX,
    SINGLE,
    Q,
    contents,
    edit_json,
    edit_tensors,
    load,
    lora,
    merge,
    save_adapter,
    save_base,
    tensors,
)
from tests.support.helpers import same_bits
from tests.support.models import assert_agree, bert, gpt2, llama, logits, quiet, tokens

pytestmark = quiet


CASES = {
    "all": {},
    "rslora": {"use_rslora": True, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]},
    "ranks": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {r"layers\.1\..*v_proj": 32}},
    "regex": {"target_modules": r".*\.1\..*(up|o)_proj"},
    "head": {"target_modules": ["lm_head", "q_proj"]},
    "layer": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": 0},
    "layers": {
        "target_modules": ["q_proj"],
        "layers_to_transform": [1],
        "layers_pattern": ["h", "layers"],
    },
}


@pytest.mark.parametrize("name", CASES)
def test_merged_checkpoint_has_logits_of_peft(tmp_path, name):
    base, ids = save_base(tmp_path / "base"), tokens(2, 7)
    theirs = save_adapter(tmp_path / "adapter", **CASES[name])
    assert load(base).lm_head.weight.dtype == torch.float32
    found = merge(tmp_path)
    assert_agree(logits(load(tmp_path / "out"), ids), logits(theirs, ids), logits(llama(), ids))
    assert all(fidelity.gain == pytest.approx(1, abs=1e-5) for fidelity in found.values())
    targets = {n for n, m in theirs.get_base_model().named_modules() if hasattr(m, "lora_A")}
    assert found.keys() == targets
    assert list(found) == sorted(found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_merged_half_precision_base_matches_peft(tmp_path, dtype):
    save_base(tmp_path / "base", llama(dtype=dtype))
    theirs, ids = save_adapter(tmp_path / "adapter", llama(dtype=dtype), 0.2), tokens(2, 7)
    merge(tmp_path)
    base = logits(llama(dtype=dtype), ids)
    assert_agree(logits(load(tmp_path / "out"), ids), logits(theirs, ids), base)


def test_merge_includes_lora_bias_and_trained_biases(tmp_path):
    """lora_B's bias onto the layer's; those that PEFT trained take the base's place."""

    def build():
        return llama(attention_bias=True, mlp_bias=True)

    save_base(tmp_path / "base", build())
    options = {"target_modules": ["q_proj", "up_proj"], "lora_bias": True, "bias": "lora_only"}
    theirs, ids = save_adapter(tmp_path / "adapter", build(), **options), tokens(2, 7)
    merge(tmp_path)
    assert_agree(logits(load(tmp_path / "out"), ids), logits(theirs, ids), logits(build(), ids))
    before, after = tensors(tmp_path / "base"), tensors(tmp_path / "out")
    changed = {n for n in before if n.endswith("bias") and not same_bits(before[n], after[n])}
    assert changed == {n for n in before if n.endswith(("q_proj.bias", "up_proj.bias"))}


def test_merge_includes_all_biases_of_bert(tmp_path):
    save_base(tmp_path / "base", bert())
    theirs = save_adapter(tmp_path / "adapter", bert(), target_modules=["query"], bias="all")
    merge(tmp_path)
    ids = tokens(2, 7)
    got = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "out").eval()
    assert_agree(logits(got, ids), logits(theirs, ids), logits(bert(), ids))


@pytest.mark.parametrize("bare", [False, True], ids=["with prefix", "without prefix"])
def test_merge_handles_transposed_weights_of_gpt2(tmp_path, bare):
    """GPT-2's Conv1D, the square one too, in one file; older checkpoints lack the prefix."""
    base, ids = save_base(tmp_path / "base", gpt2(), "1GB"), tokens(2, 7)
    options = {"target_modules": ["c_attn", "c_proj", "c_fc"]}
    theirs = save_adapter(tmp_path / "adapter", gpt2(), **options)
    if bare:
        edit_tensors(base / SINGLE, lambda t: {n.removeprefix("transformer."): t[n] for n in t})
    edit_json(tmp_path / "adapter" / "adapter_config.json", fan_in_fan_out=not bare)
    found = merge(tmp_path)
    assert_agree(logits(load(tmp_path / "out"), ids), logits(theirs, ids), logits(gpt2(), ids))
    assert len(found) == 8
    assert all(fidelity.gain == pytest.approx(1, abs=1e-5) for fidelity in found.values())
    assert not (tmp_path / "out" / INDEX).exists()


def test_merge_changes_only_the_adapted_tensors(base_and_adapter):
    """Same files, same headers, same index and config; of the tensors the merged ones alone."""
    base, out = base_and_adapter / "base", base_and_adapter / "out"
    for name in ("pytorch_model.bin", "adapter_config.json", "model.onnx", ".gitattributes"):
        (base / name).write_text("{}")
    save_adapter(base_and_adapter / "some", target_modules=["q_proj"])
    before = contents(base)
    found = merge(base_and_adapter, "some")
    assert contents(base) == before
    after = contents(out)
    left = {"pytorch_model.bin", "adapter_config.json", "model.onnx", ".gitattributes"}
    assert after.keys() == before.keys() - left
    assert len(found) == 2
    assert {n for n in after if after[n] != before[n]} == {
        json.loads(before[INDEX])["weight_map"][f"{layer}.weight"] for layer in found
    }
    for name in after:
        if name.endswith(".safetensors"):
            length = 8 + int.from_bytes(before[name][:8], "little")
            assert after[name][:length] == before[name][:length]
            assert len(after[name]) == len(before[name])
    old, new = tensors(base), tensors(out)
    assert {n for n in old if not same_bits(old[n], new[n])} == {f"{n}.weight" for n in found}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_sums_adapters_with_bits_of_merge_op(tmp_path, dtype):
    """Several adapters and weights in one sum, rounded once; the fidelity is the measured one."""
    save_base(tmp_path / "base", llama(dtype=dtype))
    save_adapter(tmp_path / "one", lora_alpha=6, r=3)
    save_adapter(tmp_path / "two", target_modules=["q_proj"])
    found = merge(tmp_path, ("one", 0.7), "two", ("one", -0.2))
    before, after = tensors(tmp_path / "base"), tensors(tmp_path / "out")
    for layer in found:
        given = [(*lora(tmp_path / "one", layer), 2 * 0.7)]
        given += [(*lora(tmp_path / "two", layer), 2.0)] if "q_proj" in layer else []
        given += [(*lora(tmp_path / "one", layer), 2 * -0.2)]
        merged = before[f"{layer}.weight"].clone()
        F.merge_(merged, given, receipt=False)
        assert same_bits(after[f"{layer}.weight"], merged)
        assert found[layer] == measure(before[f"{layer}.weight"], merged, given)


@pytest.mark.parametrize(
    "stored, wanted",
    [
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float16),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float16),
        (torch.float16, torch.float64),
        (torch.bfloat16, torch.bfloat16),
    ],
)
def test_merge_rounds_once_into_requested_dtype(tmp_path, stored, wanted):
    """One rounding, into the dtype asked for; what is no float stays as it is."""
    base, out = save_base(tmp_path / "base", llama(dtype=stored), "1GB"), tmp_path / "out"
    extra = {"a": torch.arange(3), "b": torch.tensor([True] * 5), "c": torch.zeros(0, 4)}
    extra |= {"odd": torch.ones(3, dtype=stored), "z": torch.arange(5, dtype=torch.int32)}
    edit_tensors(base / SINGLE, lambda t: t.update(extra))
    edit_json(base / CONFIG, text_config={"torch_dtype": "float8"}, torch_dtype="float8")
    save_adapter(tmp_path / "adapter", target_modules=["q_proj"])
    found = merge(tmp_path, dtype=wanted)
    before, after = tensors(base), tensors(out)
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        layer = name.removesuffix(".weight")
        if layer in found:
            exact = before[name].to(torch.promote_types(stored, wanted))
            F.merge_(exact, [(*lora(tmp_path / "adapter", layer), 2.0)], receipt=False)
            assert same_bits(tensor, exact.to(wanted))
        else:
            floating = before[name].is_floating_point()
            assert same_bits(tensor, before[name].to(wanted) if floating else before[name])
    config = json.loads((out / CONFIG).read_text())
    name = str(wanted).removeprefix("torch.")
    assert config["dtype"] == config["torch_dtype"] == config["text_config"]["torch_dtype"] == name
    shard = shards.open_shard(out / SINGLE)
    assert shard.metadata == {"format": "pt"}
    # As loaders that map the file need it.
    assert all(entry.offset % (entry.itemsize or 1) == 0 for entry in shard.tensors.values())


def test_merge_to_another_dtype_updates_config_and_index(base_and_adapter):
    """transformers loads it so, and the index tells the new size."""
    config = base_and_adapter / "base" / CONFIG
    values = json.loads(config.read_text())
    del values["dtype"]
    config.write_text(json.dumps(values))
    merge(base_and_adapter, dtype=torch.bfloat16)
    model = load(base_and_adapter / "out", dtype="auto")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    before, after = (
        json.loads((base_and_adapter / name / INDEX).read_text()) for name in ("base", "out")
    )
    assert after["weight_map"] == before["weight_map"]
    assert after["metadata"]["total_size"] == sum(
        t.nbytes for t in tensors(base_and_adapter / "out").values()
    )
    assert after["metadata"]["total_parameters"] == before["metadata"]["total_parameters"]


def test_merge_accepts_checkpoint_with_longer_prefix(base_and_adapter):
    for path in (base_and_adapter / "base").glob("*.safetensors"):
        edit_tensors(path, lambda t: {f"language.{name}": t[name] for name in t})
    index = json.loads((base_and_adapter / "base" / INDEX).read_text())
    index["weight_map"] = {f"language.{n}": f for n, f in index["weight_map"].items()}
    (base_and_adapter / "base" / INDEX).write_text(json.dumps(index))
    assert len(merge(base_and_adapter)) == 14
    assert f"language.{Q}.weight" in tensors(base_and_adapter / "out")


def test_merge_warns_of_low_fidelity(tmp_path):
    save_base(tmp_path / "base", llama(dtype=torch.bfloat16))
    save_adapter(tmp_path / "adapter", std=0.001)
    with pytest.warns(
        FidelityWarning, match="14 of 14 layers kept less than 90% .* the least model"
    ):
        found = merge(tmp_path)
    assert all(fidelity.gain < 0.9 for fidelity in found.values())
    given = merge_folder(
        tmp_path / "base", tmp_path / "adapter", tmp_path / "wide", dtype=torch.float32
    )
    assert given.warning() is None


def test_merge_accepts_adapter_of_any_float_dtype(base_and_adapter):
    edit_tensors(
        base_and_adapter / "adapter" / "adapter_model.safetensors",
        lambda t: {n: t[n].bfloat16() for n in t},
    )
    assert len(merge(base_and_adapter)) == 14


def test_merge_keeps_nan_of_the_base(base_and_adapter):
    file = json.loads((base_and_adapter / "base" / INDEX).read_text())["weight_map"][f"{Q}.weight"]

    def spoil(t: dict[str, Tensor]) -> None:
        t[f"{Q}.weight"][3, 5] = float("nan")

    edit_tensors(base_and_adapter / "base" / file, spoil)
    found = merge(base_and_adapter)
    after = tensors(base_and_adapter / "out")[f"{Q}.weight"]
    assert after.isnan().nonzero().tolist() == [[3, 5]]
    assert found[Q].gain == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("said", [False, None])
def test_merge_changes_output_layer_that_is_not_tied(base_and_adapter, said):
    """Whether or not the config says so, if its numbers are not the embedding's."""
    save_adapter(base_and_adapter / "head", target_modules=["lm_head"])
    edit_json(base_and_adapter / "base" / CONFIG, tie_word_embeddings=said)
    if said is None:
        values = json.loads((base_and_adapter / "base" / CONFIG).read_text())
        del values["tie_word_embeddings"]
        (base_and_adapter / "base" / CONFIG).write_text(json.dumps(values))
    assert list(merge(base_and_adapter, "head")) == ["lm_head"]


def test_merge_reads_base_that_is_read_only(base_and_adapter):
    """It is only read: nothing is made beside it, nothing of it is touched."""
    base = base_and_adapter / "base"
    for path in [*base.rglob("*"), base]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = {path: path.stat().st_mtime_ns for path in [*base.rglob("*"), base]}
    try:
        merge(base_and_adapter)
        assert {path: path.stat().st_mtime_ns for path in [*base.rglob("*"), base]} == before
        assert all(os.access(path, os.W_OK) for path in (base_and_adapter / "out").rglob("*"))
    finally:
        for path in [base, *base.rglob("*")]:
            path.chmod(0o755)
