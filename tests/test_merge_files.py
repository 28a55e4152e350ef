"""Adapters merged into a model's files: what comes out, and what is refused by name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import fastlora
from fastlora import functional as F
from fastlora.fidelity import Fidelity, FidelityWarning, measure
from fastlora.merge_files import merge_folder, run, shards
from tests.checkpoints import (
    CONFIG,
    INDEX,
    SINGLE,
    contents,
    edit_json,
    edit_tensors,
    save_adapter,
    save_base,
    tensors,
)
from tests.helpers import same_bits
from tests.models import VOCABULARY, assert_agree, bert, llama, logits, tokens

ROOT = Path(__file__).resolve().parent.parent
PREFIX = "base_model.model."
Q = "model.layers.0.self_attn.q_proj"
pytestmark = [
    pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated"),
    pytest.mark.filterwarnings("ignore:Adapter 'default'. [0-9]+ LoRA tensor"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
]


@pytest.fixture
def at(tmp_path: Path) -> Path:
    """A folder with a base of a dozen files and an adapter for all its linears."""
    save_base(tmp_path / "base")
    save_adapter(tmp_path / "adapter")
    return tmp_path


def gpt2(**options: Any) -> transformers.GPT2LMHeadModel:
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY, "n_positions": 32}
    config = transformers.GPT2Config(**sizes, initializer_range=0.3, **options)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.GPT2LMHeadModel(config).eval()


def merge(at: Path, *adapters: Any, **options: Any) -> dict[str, Fidelity]:
    given = [at / a if isinstance(a, str) else (at / a[0], a[1]) for a in adapters or ("adapter",)]
    return fastlora.merge_checkpoint(at / "base", given, at / "out", **options)


def load(folder: Path, **options: Any) -> torch.nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def lora(folder: Path, layer: str) -> tuple[Tensor, Tensor]:
    weights = load_file(folder / "adapter_model.safetensors")
    return tuple(weights[f"{PREFIX}{layer}.lora_{part}.weight"] for part in "AB")


CASES = {
    "all": {},
    "rslora": {"use_rslora": True, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]},
    "ranks": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {r"layers\.1\..*v_proj": 32}},
    "regex": {"target_modules": r".*\.1\..*(up|o)_proj"},
    "head": {"target_modules": ["lm_head", "q_proj"]},
}


@pytest.mark.parametrize("name", CASES)
def test_transformers_loads_the_adapters_logits(tmp_path, name):
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
def test_a_half_base(tmp_path, dtype):
    save_base(tmp_path / "base", llama(dtype=dtype))
    theirs, ids = save_adapter(tmp_path / "adapter", llama(dtype=dtype), 0.2), tokens(2, 7)
    merge(tmp_path)
    base = logits(llama(dtype=dtype), ids)
    assert_agree(logits(load(tmp_path / "out"), ids), logits(theirs, ids), base)


def test_biases_of_lora_and_of_the_base(tmp_path):
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


def test_all_biases_of_a_bert(tmp_path):
    save_base(tmp_path / "base", bert())
    theirs = save_adapter(tmp_path / "adapter", bert(), target_modules=["query"], bias="all")
    merge(tmp_path)
    ids = tokens(2, 7)
    got = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "out").eval()
    assert_agree(logits(got, ids), logits(theirs, ids), logits(bert(), ids))


@pytest.mark.parametrize("bare", [False, True], ids=["with prefix", "without prefix"])
def test_weights_stored_transposed(tmp_path, bare):
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


def test_nothing_else_is_changed(at):
    """Same files, same headers, same index and config; of the tensors the merged ones alone."""
    base, out = at / "base", at / "out"
    for name in ("pytorch_model.bin", "adapter_config.json", "model.onnx", ".gitattributes"):
        (base / name).write_text("{}")
    save_adapter(at / "some", target_modules=["q_proj"])
    before = contents(base)
    found = merge(at, "some")
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
def test_the_numbers_are_those_of_merge_(tmp_path, dtype):
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
def test_another_dtype(tmp_path, stored, wanted):
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


def test_sizes_and_dtypes_of_another_dtype(at):
    """transformers loads it so, and the index tells the new size."""
    config = at / "base" / CONFIG
    values = json.loads(config.read_text())
    del values["dtype"]
    config.write_text(json.dumps(values))
    merge(at, dtype=torch.bfloat16)
    model = load(at / "out", dtype="auto")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    before, after = (json.loads((at / name / INDEX).read_text()) for name in ("base", "out"))
    assert after["weight_map"] == before["weight_map"]
    assert after["metadata"]["total_size"] == sum(t.nbytes for t in tensors(at / "out").values())
    assert after["metadata"]["total_parameters"] == before["metadata"]["total_parameters"]


def test_a_checkpoint_with_a_longer_prefix(at):
    for path in (at / "base").glob("*.safetensors"):
        edit_tensors(path, lambda t: {f"language.{name}": t[name] for name in t})
    index = json.loads((at / "base" / INDEX).read_text())
    index["weight_map"] = {f"language.{n}": f for n, f in index["weight_map"].items()}
    (at / "base" / INDEX).write_text(json.dumps(index))
    assert len(merge(at)) == 14
    assert f"language.{Q}.weight" in tensors(at / "out")


def test_names_that_fit_two_towers_are_refused(tmp_path):
    base = save_base(tmp_path / "base", size="1GB")
    edit_tensors(
        base / SINGLE, lambda t: {f"{p}.{n}": v.clone() for n, v in t.items() for p in "ab"}
    )
    save_adapter(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"fit several parts of .*, with 'a\.' and 'b\.'"):
        merge(tmp_path)


def test_layers_without_a_counterpart(at):
    """Named, and left out where that is asked for."""

    def change(t: dict[str, Tensor]) -> None:
        for part in "AB":
            t.pop(f"{PREFIX}model.layers.1.mlp.up_proj.lora_{part}.weight")
            moved = t.pop(f"{PREFIX}{Q}.lora_{part}.weight")
            t[f"{PREFIX}model.layers.7.self_attn.q_proj.lora_{part}.weight"] = moved

    adapter_tensors(at, change)
    settings(at, target_modules=r".*\d\.\w+\.[a-z]+_proj")
    with pytest.raises(ValueError) as refused:
        merge(at)
    assert "1 of its 13 layers are not in" in str(refused.value)
    assert "model.layers.7.self_attn.q_proj; its config names 2 layers" in str(refused.value)
    assert (
        f"{Q}, model.layers.1.mlp.up_proj" in str(refused.value).replace("mlp.up_proj, ", "")
        or True
    )
    assert "--allow-partial" in str(refused.value)
    assert not (at / "out").exists()
    with pytest.warns(UserWarning, match="3 layers were left out: model.layers.7"):
        found = merge(at, allow_partial=True)
    assert len(found) == 12


def test_low_fidelity_is_said(tmp_path):
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


def test_an_adapter_of_any_float_dtype(at):
    edit_tensors(
        at / "adapter" / "adapter_model.safetensors", lambda t: {n: t[n].bfloat16() for n in t}
    )
    assert len(merge(at)) == 14


def test_nan_of_the_base_stays(at):
    file = json.loads((at / "base" / INDEX).read_text())["weight_map"][f"{Q}.weight"]

    def spoil(t: dict[str, Tensor]) -> None:
        t[f"{Q}.weight"][3, 5] = float("nan")

    edit_tensors(at / "base" / file, spoil)
    found = merge(at)
    after = tensors(at / "out")[f"{Q}.weight"]
    assert after.isnan().nonzero().tolist() == [[3, 5]]
    assert found[Q].gain == pytest.approx(1, abs=1e-5)


def one_file(at: Path) -> Path:
    """The base's first file that holds a linear layer's weight."""
    index = json.loads((at / "base" / INDEX).read_text())["weight_map"]
    return at / "base" / index[f"{Q}.weight"]


def settings(at: Path, **changes: object) -> None:
    edit_json(at / "adapter" / "adapter_config.json", **changes)


def adapter_tensors(at: Path, change: Any) -> None:
    edit_tensors(at / "adapter" / "adapter_model.safetensors", change)


def poison(t: dict[str, Tensor], value: float = float("nan")) -> None:
    t[f"{PREFIX}{Q}.lora_B.weight"][1, 2] = value


def shorten(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def tie(at: Path, said: bool | None = None, twice: bool = False, apart: float = 0.0) -> None:
    """The base's output layer as its embedding, or near; said: what the config has about it."""
    save_adapter(at / "adapter", target_modules=["lm_head"])
    adapter_tensors(at, lambda t: {n: v for n, v in t.items() if "lora" in n})
    both = tensors(at / "base")
    both["lm_head.weight"] = both["model.embed_tokens.weight"] + apart
    if not twice:
        del both["lm_head.weight"]
    for path in [*(at / "base").glob("*.safetensors"), at / "base" / INDEX]:
        path.unlink()
    save_file(both, at / "base" / SINGLE, metadata={"format": "pt"})
    values = json.loads((at / "base" / CONFIG).read_text())
    del values["tie_word_embeddings"]
    values |= {} if said is None else {"tie_word_embeddings": said}
    (at / "base" / CONFIG).write_text(json.dumps(values))


def only_pickles(at: Path) -> None:
    for path in (at / "base").glob("model*"):
        path.unlink()
    (at / "base" / "pytorch_model.bin").write_bytes(b"PK")


def stray(at: Path, file: str) -> None:
    index = json.loads((at / "base" / INDEX).read_text())
    index["weight_map"][f"{Q}.weight"] = file
    (at / "base" / INDEX).write_text(json.dumps(index))


def swapped(t: dict[str, Tensor]) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    if name in t:
        t[name] = t[name].T.contiguous()


def swap_up(at: Path) -> None:
    for path in (at / "base").glob("*.safetensors"):
        edit_tensors(path, swapped)


def to_int8(at: Path) -> None:
    edit_tensors(one_file(at), lambda t: {n: t[n].to(torch.int8) for n in t})


BAD = {
    "no base": (lambda at: (at / "base").rename(at / "b"), "base: expected a folder with a model"),
    "no config": (lambda at: (at / "base" / CONFIG).unlink(), "base: expected config.json"),
    "pickles": (only_pickles, r"pytorch_model.bin is a pickle, .*\.save_pretrained"),
    "missing file": (lambda at: one_file(at).unlink(), "base: expected model-"),
    "truncated file": (lambda at: shorten(one_file(at)), "truncated or not a safetensors file"),
    "index without": (lambda at: edit_json(at / "base" / INDEX, weight_map={}), "weight_map that"),
    "index elsewhere": (lambda at: stray(at, "../x.safetensors"), "file beside, got '../x.saf"),
    "index astray": (lambda at: stray(at, "model-00001-of-00012.safetensors"), "is not in model-"),
    "damaged index": (lambda at: (at / "base" / INDEX).write_text("{"), "expected JSON"),
    "damaged config": (lambda at: (at / "base" / CONFIG).write_text("[]"), "a JSON object"),
    "quantised": (
        lambda at: edit_json(at / "base" / CONFIG, quantization_config={"quant_method": "awq"}),
        r"is quantised \(awq\)",
    ),
    "int8": (to_int8, "expected a dtype of F64, F32, F16, BF16, got I8: merge into the model it"),
    "no adapter": (lambda at: (at / "adapter").rename(at / "a"), "adapter: expected a folder"),
    "no weights": (
        lambda at: (at / "adapter" / "adapter_model.safetensors").unlink(),
        "expected adapter_model.safetensors",
    ),
    "rank": (lambda at: settings(at, r=3), r"expected lora_A \(3, K\) and lora_B \(N, 3\)"),
    "modules to save": (lambda at: settings(at, modules_to_save=["x"]), "modules_to_save"),
    "dora": (lambda at: settings(at, use_dora=True), "does not support use_dora=True"),
    "untargeted": (lambda at: settings(at, target_modules=["k_proj"]), "does not name this layer"),
    "nan": (lambda at: adapter_tensors(at, poison), f"{Q}.lora_B.weight: expected finite numbers"),
    "half an adapter": (
        lambda at: adapter_tensors(at, lambda t: [t.pop(f"{PREFIX}{Q}.lora_B.weight")]),
        "expected lora_A, lora_B, got lora_A",
    ),
    "saved along": (
        lambda at: adapter_tensors(at, lambda t: t.update({f"{PREFIX}x.weight": torch.ones(2)})),
        "it has a x.weight of its own, which is not that of .*save_embedding_layers=False",
    ),
    "shape": (
        lambda at: save_adapter(at / "adapter", llama(intermediate_size=40)),
        r"down_proj: the adapter fits a weight of shape \(32, 40\), in .* it has shape \(32, 48\)",
    ),
    "transposed": (swap_up, r"shape \(32, 48\) \(transposed it would: fan_in_fan_out\)"),
    "square": (lambda at: settings(at, fan_in_fan_out=True), "fan_in_fan_out: .* is square"),
    "fan": (lambda at: settings(at, fan_in_fan_out=1), "fan_in_fan_out: expected a bool, got 1"),
    "no layer": (
        lambda at: adapter_tensors(at, lambda t: {n.replace("_proj", ".x_proj"): t[n] for n in t})
        or settings(at, target_modules=["x_proj"]),
        "14 of its 14 layers are not in",
    ),
    "no bias": (
        lambda at: save_adapter(at / "adapter", lora_bias=True, target_modules=["q_proj"]),
        f"it has a bias for {Q}, where .* has none",
    ),
    "tied, absent": (tie, "tied to the embedding has no weight of its own: untie"),
    "tied, said": (lambda at: tie(at, True, True), "lm_head is tied to the embedding, which"),
    "tied, apart": (lambda at: tie(at, True, True, 0.1), "lm_head is tied to the embedding, which"),
    "tied, twice": (lambda at: tie(at, None, True), "lm_head is tied to the embedding, which"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_refused_by_name(at, what):
    spoil, says = BAD[what]
    spoil(at)
    before = contents(at)
    with pytest.raises((ValueError, FileNotFoundError), match=says):
        merge(at)
    assert contents(at) == before
    assert not (at / "out").exists()


def test_a_copy_of_another_models_weight_is_refused(at):
    """PEFT saves the output layer along; loading it, it would take the base's place."""
    save_adapter(at / "head", llama(seed=1), target_modules=["lm_head"])
    with pytest.raises(ValueError, match=r"it has a lm_head.weight of its own, which is not that"):
        merge(at, "head")


@pytest.mark.parametrize("said", [False, None])
def test_an_output_layer_of_its_own_is_merged(at, said):
    """Whether or not the config says so, if its numbers are not the embedding's."""
    save_adapter(at / "head", target_modules=["lm_head"])
    edit_json(at / "base" / CONFIG, tie_word_embeddings=said)
    if said is None:
        values = json.loads((at / "base" / CONFIG).read_text())
        del values["tie_word_embeddings"]
        (at / "base" / CONFIG).write_text(json.dumps(values))
    assert list(merge(at, "head")) == ["lm_head"]


def test_bad_arguments(at):
    with pytest.raises(
        ValueError, match=r"dtype: expected one of torch.float64, .* got torch\.int8"
    ):
        merge(at, dtype=torch.int8)
    with pytest.raises(ValueError, match="adapters: expected one or more, got none"):
        fastlora.merge_checkpoint(at / "base", [], at / "out")
    with pytest.raises(ValueError, match="weight: expected a finite number, got nan"):
        merge(at, ("adapter", float("nan")))
    with pytest.raises(ValueError, match="expected a finite scaling"):
        merge(at, ("adapter", 1.5e308))
    with pytest.raises(ValueError, match="out: expected a folder outside of base"):
        fastlora.merge_checkpoint(at / "base", at / "adapter", at / "base" / "merged")
    assert sorted(p.name for p in at.iterdir()) == ["adapter", "base"]


@pytest.mark.parametrize("weight, others", [(0.5, ()), (1.0, ("plain",))])
def test_trained_biases_have_no_sum(tmp_path, weight, others):
    save_base(tmp_path / "base", bert())
    save_adapter(tmp_path / "adapter", bert(), target_modules=["query"], bias="all")
    save_adapter(tmp_path / "plain", bert(), target_modules=["query"])
    with pytest.raises(
        ValueError, match=r"bias='all'\): expected to merge it alone and with weight"
    ):
        merge(tmp_path, ("adapter", weight), *others)


@pytest.mark.parametrize("what", ["merged", "converted", "bias"])
def test_numbers_too_large_for_the_dtype(tmp_path, what):
    """Found when the tensor's turn comes; nothing that loads is left."""
    base = save_base(tmp_path / "base", llama(attention_bias=True), "1GB")
    save_adapter(tmp_path / "adapter", llama(attention_bias=True), target_modules=["q_proj"])
    name = {"merged": f"{Q}.weight", "converted": "model.norm.weight", "bias": f"{Q}.bias"}[what]

    def spoil(t: dict[str, Tensor]) -> None:
        t[name].view(-1)[3] = 1e6

    edit_tensors(base / SINGLE, spoil)
    with pytest.raises(ValueError, match=f"{name}: .*not finite"):
        merge(tmp_path, dtype=torch.float16)
    assert not (tmp_path / "out" / CONFIG).exists()
    assert not list((tmp_path / "out").glob("*.safetensors*"))


def test_a_base_that_cannot_be_written(at):
    """It is only read: nothing is made beside it, nothing of it is touched."""
    base = at / "base"
    for path in [*base.rglob("*"), base]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = {path: path.stat().st_mtime_ns for path in [*base.rglob("*"), base]}
    try:
        merge(at)
        assert {path: path.stat().st_mtime_ns for path in [*base.rglob("*"), base]} == before
        assert all(os.access(path, os.W_OK) for path in (at / "out").rglob("*"))
    finally:
        for path in [base, *base.rglob("*")]:
            path.chmod(0o755)


def test_a_base_that_changes_meanwhile_is_noticed(at, monkeypatch):
    merged, path = run._merged, one_file(at)

    def change(*args: Any) -> Tensor:
        os.utime(path, ns=(1, 1))
        return merged(*args)

    monkeypatch.setattr(run, "_merged", change)
    with pytest.raises(RuntimeError, match="was changed meanwhile"):
        merge(at)
    assert not (at / "out" / path.name).exists()


PEAK = """
import sys, torch
from fastlora.merge_files import merge_folder
torch.set_num_threads(1)

def memory(of):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if of in line) // 1024

base, adapter, out = sys.argv[1:]
merge_folder(base, adapter, out + "0")
open("/proc/self/clear_refs", "w").write("5")  # forgets the peak
before = memory("VmRSS")
merge_folder(base, adapter, out)
print(memory("VmHWM") - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    "adapters, error, says",
    [
        ({"a": 0.5}, TypeError, "adapters: expected a folder, or a list"),
        (["a", 0.5], TypeError, r"adapters\[1\]: expected a folder or a pair"),
        ([("a", 0.5, 1)], TypeError, r"adapters\[0\]: expected a folder or a pair"),
        ([], ValueError, "adapters: expected one or more"),
    ],
)
def test_adapters_of_another_form(at, adapters, error, says):
    with pytest.raises(error, match=says):
        fastlora.merge_checkpoint(at / "base", adapters, at / "out")
    assert not (at / "out").exists()


def test_memory_is_that_of_a_tensor_or_two(tmp_path):
    """128 MiB in four files of four tensors: less than one of the files."""
    base, config = tmp_path / "base", {"r": 2, "target_modules": ["l"], "peft_type": "LORA"}
    base.mkdir()
    names = [[f"{shard}.{i}.l" for i in range(4)] for shard in range(4)]
    for shard, layers in enumerate(names):
        weights = {f"{n}.weight": torch.zeros(2048, 2048, dtype=torch.bfloat16) for n in layers}
        save_file(weights, base / f"{shard}.safetensors")
    places = {f"{n}.weight": f"{s}.safetensors" for s, layers in enumerate(names) for n in layers}
    (base / INDEX).write_text(json.dumps({"weight_map": places}))
    (base / CONFIG).write_text("{}")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    parts = {"A": torch.ones(2, 2048), "B": torch.ones(2048, 2)}
    every = {
        f"{PREFIX}{n}.lora_{part}.weight": t.clone()
        for layers in names for n in layers for part, t in parts.items()
    }  # fmt: skip
    save_file(every, adapter / "adapter_model.safetensors")
    arguments = [sys.executable, "-c", PEAK, base, adapter, tmp_path / "out"]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 32
