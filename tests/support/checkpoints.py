"""Tiny models and adapters in folders, as transformers and PEFT save them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import fastlora
from fastlora.functional.fidelity import Fidelity
from tests.support.models import VOCABULARY, llama, randomise_lora

CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
# Of this size a tiny Llama has a dozen files.
SMALL = "10KB"
# Of every adapter's tensors; a layer that the tests pick out.
PREFIX, Q = "base_model.model.", "model.layers.0.self_attn.q_proj"


def save_base(folder: Path, model: nn.Module | None = None, size: str = SMALL) -> Path:
    """A model's folder, by default a float32 Llama's in a dozen files, and a tokenizer's files."""
    (model or llama()).save_pretrained(folder, max_shard_size=size)
    (folder / "tokenizer.json").write_text('{"model": {"vocab": {}}}')
    (folder / "chat_templates").mkdir()
    (folder / "chat_templates" / "tool.jinja").write_text("{{ tool }}")
    return folder


def save_adapter(
    folder: Path, model: nn.Module | None = None, std: float = 0.05, **options: Any
) -> nn.Module:
    """Writes a PEFT adapter of random numbers; returns PEFT's model, unmerged."""
    config = peft.LoraConfig(**({"target_modules": "all-linear", "r": 4} | options))
    theirs = randomise_lora(peft.get_peft_model(model or llama(), config), std)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if name.endswith(".bias") and "lora_" not in name and parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) * std)
    theirs.save_pretrained(str(folder))
    return theirs.eval()


def contents(folder: Path) -> dict[str, bytes]:
    """Every file, hidden ones too, by its path within."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a model's folder."""
    return {
        name: tensor
        for path in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def edit_tensors(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Rewrites a safetensors file; its index, if there is one, is left behind."""
    loaded = load_file(path)
    changed = change(loaded)
    save_file(changed if isinstance(changed, dict) else loaded, path, metadata={"format": "pt"})


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_adapter(at: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    edit_tensors(at / "adapter" / "adapter_model.safetensors", change)


def edit_settings(at: Path, **changes: object) -> None:
    edit_json(at / "adapter" / "adapter_config.json", **changes)


def merge(at: Path, *adapters: Any, **options: Any) -> dict[str, Fidelity]:
    """The base in the folder and adapters, names or (name, weight), into ``out`` beside them."""
    given = [at / a if isinstance(a, str) else (at / a[0], a[1]) for a in adapters or ("adapter",)]
    return fastlora.merge_checkpoint(at / "base", given, at / "out", **options)


def load(folder: Path, **options: Any) -> nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def lora(folder: Path, layer: str) -> tuple[Tensor, Tensor]:
    """A layer's lora_A and lora_B."""
    weights = load_file(folder / "adapter_model.safetensors")
    A, B = (weights[f"{PREFIX}{layer}.lora_{part}.weight"] for part in "AB")
    return A, B


def save_resized(at: Path, size: int, *, tied: bool = False, **options: Any) -> nn.Module:
    """A base and an adapter trained after its vocabulary got ``size`` rows; PEFT's model of it."""
    save_base(at / "base", llama(tie_word_embeddings=tied))
    model = resized(at / "base", size)
    return save_adapter(at / "adapter", model, **({"target_modules": ["q_proj"]} | options))


def resized(base: Path, size: int, seed: int = 0) -> nn.Module:
    """The base with so many rows, the new ones random: by PEFT's advice before loading."""
    model = load(base)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model.resize_token_embeddings(size, mean_resizing=False)
        for end in (model.get_input_embeddings(), model.get_output_embeddings()):
            torch.nn.init.normal_(end.weight.data[VOCABULARY:], std=0.3)
    return model.eval()
