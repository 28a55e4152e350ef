"""Merging refuses bad input by name and leaves nothing behind."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import fastlora
from fastlora.merge_files import run
from tests.support.checkpoints import (
    CONFIG,
    INDEX,
    PREFIX,
    SINGLE,
    Q,
    contents,
    edit_adapter,
    edit_json,
    edit_settings,
    edit_tensors,
    merge,
    save_adapter,
    save_base,
    tensors,
)
from tests.support.models import bert, llama, quiet

pytestmark = quiet


def one_file(at: Path) -> Path:
    """The base's first file that holds a linear layer's weight."""
    index = json.loads((at / "base" / INDEX).read_text())["weight_map"]
    return at / "base" / index[f"{Q}.weight"]


def poison(t: dict[str, Tensor], value: float = float("nan")) -> None:
    t[f"{PREFIX}{Q}.lora_B.weight"][1, 2] = value


def shorten(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def tie(at: Path, said: bool | None = None, twice: bool = False, apart: float = 0.0) -> None:
    """The base's output layer as its embedding, or near; said: what the config has about it."""
    save_adapter(at / "adapter", target_modules=["lm_head"])
    edit_adapter(at, lambda t: {n: v for n, v in t.items() if "lora" in n})
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
    "rank": (lambda at: edit_settings(at, r=3), r"expected lora_A \(3, K\) and lora_B \(N, 3\)"),
    "modules to save": (lambda at: edit_settings(at, modules_to_save=["x"]), "modules_to_save"),
    "dora": (lambda at: edit_settings(at, use_dora=True), "does not support use_dora=True"),
    "untargeted": (
        lambda at: edit_settings(at, target_modules=["k_proj"]),
        "does not name this layer",
    ),
    "nan": (lambda at: edit_adapter(at, poison), f"{Q}.lora_B.weight: expected finite numbers"),
    "half an adapter": (
        lambda at: edit_adapter(at, lambda t: [t.pop(f"{PREFIX}{Q}.lora_B.weight")]),
        "expected lora_A, lora_B, got lora_A",
    ),
    "saved along": (
        lambda at: edit_adapter(at, lambda t: t.update({f"{PREFIX}x.weight": torch.ones(2)})),
        "it has x.weight along, which is not in .*: merge it into the model that it was trained on",
    ),
    "shape": (
        lambda at: save_adapter(at / "adapter", llama(intermediate_size=40)),
        r"down_proj: the adapter fits a weight of shape \(32, 40\), in .* it has shape \(32, 48\)",
    ),
    "transposed": (swap_up, r"shape \(32, 48\) \(transposed it would: fan_in_fan_out\)"),
    "square": (lambda at: edit_settings(at, fan_in_fan_out=True), "fan_in_fan_out: .* is square"),
    "fan": (
        lambda at: edit_settings(at, fan_in_fan_out=1),
        "fan_in_fan_out: expected a bool, got 1",
    ),
    "no layer": (
        lambda at: edit_adapter(at, lambda t: {n.replace("_proj", ".x_proj"): t[n] for n in t})
        or edit_settings(at, target_modules=["x_proj"]),
        "14 of its 14 layers are not in",
    ),
    "no bias": (
        lambda at: save_adapter(at / "adapter", lora_bias=True, target_modules=["q_proj"]),
        f"it has a bias for {Q}, where .* has none",
    ),
    "tied, absent": (tie, "tied to the embedding has no weight of its own: untie"),
    "tied, said": (lambda at: tie(at, True, True), "lm_head is tied to the embedding, which"),
    "tied, swapped": (
        lambda at: tie(at, True, True) or edit_tensors(
            at / "base" / SINGLE, lambda t: [t.pop("model.embed_tokens.weight")]
        ),
        "lm_head is tied to the embedding, which",
    ),
    "tied, wider": (
        lambda at: tie(at, None, True) or edit_tensors(
            at / "base" / SINGLE, lambda t: {
                n: v.bfloat16().float() if n == "lm_head.weight" else v.bfloat16()
                for n, v in t.items()
            },
        ),
        "lm_head is tied to the embedding, which",
    ),
    "tied, twice": (lambda at: tie(at, None, True), "lm_head is tied to the embedding, which"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_merge_refuses_bad_input_by_name(base_and_adapter, what):
    spoil, says = BAD[what]
    spoil(base_and_adapter)
    before = contents(base_and_adapter)
    with pytest.raises((ValueError, FileNotFoundError), match=says):
        merge(base_and_adapter)
    assert contents(base_and_adapter) == before
    assert not (base_and_adapter / "out").exists()


def test_merge_checkpoint_refuses_bad_arguments(base_and_adapter):
    with pytest.raises(
        ValueError, match=r"dtype: expected one of torch.float64, .* got torch\.int8"
    ):
        merge(base_and_adapter, dtype=torch.int8)
    with pytest.raises(ValueError, match="adapters: expected one or more, got none"):
        fastlora.merge_checkpoint(base_and_adapter / "base", [], base_and_adapter / "out")
    with pytest.raises(ValueError, match="weight: expected a finite number, got nan"):
        merge(base_and_adapter, ("adapter", float("nan")))
    with pytest.raises(ValueError, match="expected a finite scaling"):
        merge(base_and_adapter, ("adapter", 1.5e308))
    with pytest.raises(ValueError, match="out: expected a folder outside of base"):
        fastlora.merge_checkpoint(
            base_and_adapter / "base",
            base_and_adapter / "adapter",
            base_and_adapter / "base" / "merged",
        )
    assert sorted(p.name for p in base_and_adapter.iterdir()) == ["adapter", "base"]


@pytest.mark.parametrize(
    "adapters, error, says",
    [
        ({"a": 0.5}, TypeError, "adapters: expected a folder, or a list"),
        (["a", 0.5], TypeError, r"adapters\[1\]: expected a folder or a pair"),
        ([("a", 0.5, 1)], TypeError, r"adapters\[0\]: expected a folder or a pair"),
        ([], ValueError, "adapters: expected one or more"),
    ],
)
def test_merge_checkpoint_refuses_adapters_of_wrong_type(base_and_adapter, adapters, error, says):
    with pytest.raises(error, match=says):
        fastlora.merge_checkpoint(base_and_adapter / "base", adapters, base_and_adapter / "out")
    assert not (base_and_adapter / "out").exists()


@pytest.mark.parametrize("weight, others", [(0.5, ()), (1.0, ("plain",))])
def test_merge_refuses_to_sum_trained_biases(tmp_path, weight, others):
    save_base(tmp_path / "base", bert())
    save_adapter(tmp_path / "adapter", bert(), target_modules=["query"], bias="all")
    save_adapter(tmp_path / "plain", bert(), target_modules=["query"])
    with pytest.raises(
        ValueError, match=r"bias='all'\): expected to merge it alone and with weight"
    ):
        merge(tmp_path, ("adapter", weight), *others)


@pytest.mark.parametrize("what", ["merged", "converted", "bias"])
def test_merge_refuses_numbers_too_large_for_dtype(tmp_path, what):
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


def test_merge_notices_base_that_changes_meanwhile(base_and_adapter, monkeypatch):
    merged, path = run._merge_tensor, one_file(base_and_adapter)

    def change(*args: Any) -> Tensor:
        os.utime(path, ns=(1, 1))
        return merged(*args)

    monkeypatch.setattr(run, "_merge_tensor", change)
    with pytest.raises(RuntimeError, match="was changed meanwhile"):
        merge(base_and_adapter)
    assert not (base_and_adapter / "out" / path.name).exists()
