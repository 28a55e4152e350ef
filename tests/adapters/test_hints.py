"""Every reader says what a folder that is no PEFT adapter is, and what to do."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import fastlora
from tests.support.checkpoints import edit_tensors, save_adapter, save_base
from tests.support.models import llama, quiet, untouched

pytestmark = quiet

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'a' * 64}\nsize 13648432\n"


@pytest.fixture(scope="module")
def good_adapters_and_base(tmp_path_factory) -> Path:
    """A model of PEFT's with two adapters, as PEFT saves it, and the base."""
    at = tmp_path_factory.mktemp("good")
    save_base(at / "base", size="1GB")
    theirs = save_adapter(at / "adapter", target_modules=["q_proj"])
    theirs.add_adapter("alice", peft.LoraConfig(target_modules=["v_proj"]))
    theirs.save_pretrained(str(at / "both"), selected_adapters=["alice"])
    torch.save(theirs.state_dict(), at / "state.pt")
    return at


def whole_state(at: Path, good_adapters_and_base: Path) -> None:
    """What torch would save of the model, its adapters' part."""
    state = torch.load(good_adapters_and_base / "state.pt", weights_only=True)
    save_file({n: t for n, t in state.items() if "lora_" in n and "default" in n}, at / WEIGHTS)


def injected_state(at: Path, good_adapters_and_base: Path) -> None:
    """The same of a model without PEFT's wrapper."""
    state = torch.load(good_adapters_and_base / "state.pt", weights_only=True)
    plain = {n.removeprefix("base_model.model."): t for n, t in state.items() if "default" in n}
    save_file(plain, at / WEIGHTS)


def kohya(at: Path, good_adapters_and_base: Path) -> None:
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    tensors = {f"{name}.lora_down.weight": torch.ones(4, 8), f"{name}.alpha": torch.tensor(4.0)}
    save_file(tensors | {f"{name}.lora_up.weight": torch.ones(8, 4)}, at / WEIGHTS)


def alphas_beside(at: Path, good_adapters_and_base: Path) -> None:
    def change(tensors):
        first = next(iter(tensors))
        stem = first.rpartition(".lora_")[0]
        tensors[stem + ".alpha"] = torch.tensor(4.0)

    edit_tensors(at / WEIGHTS, change)


def only_inner(at: Path, good_adapters_and_base: Path) -> None:
    (at / CONFIG).unlink()
    (at / WEIGHTS).unlink()
    for name in ("alice", "bob"):
        (at / name).mkdir()
        (at / name / CONFIG).write_text("{}")


CASES: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "state_dict": (whole_state, r"lora_A.default.weight' has .* name in it, 'default'.*get_peft_m"),
    "injected": (injected_state, r"has an adapter's name in it, 'default'.*save_pretrained"),
    "kohya": (kohya, r"attn1_to_q.alpha' is a layer's alpha.*kohya.*convert the file"),
    "alphas": (alphas_beside, r"q_proj.alpha' is a layer's alpha.*kohya.*alpha_pattern in"),
    "pointer": (
        lambda at, _: (at / WEIGHTS).write_text(POINTER),
        "a Git LFS pointer.*git lfs pull",
    ),
    "pointer of the config": (lambda at, _: (at / CONFIG).write_text(POINTER), "a Git LFS pointer"),
    "inner": (only_inner, r"there is one in '.*alice', '.*bob': give that folder \(PEFT saves an"),
}
ENTRIES = ["load", "serve", "merge", "combine", "swap"]


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("case", CASES)
def test_every_reader_gives_the_fitting_hint(tmp_path, good_adapters_and_base, case, entry):
    at = tmp_path / "a"
    at.mkdir()
    for name in (CONFIG, WEIGHTS):
        (at / name).write_bytes((good_adapters_and_base / "adapter" / name).read_bytes())
    spoil, says = CASES[case]
    spoil(at, good_adapters_and_base)
    assert_refused(entry, at, good_adapters_and_base, says)


def assert_refused(entry: str, at: Path, good_adapters_and_base: Path, says: str) -> None:
    model: nn.Module = llama()
    call: Callable[[], object] = functools.partial(fastlora.load_adapter, model, at)
    if entry == "serve":
        model = fastlora.MultiLoRAModel(model, max_adapters=1)
        call = functools.partial(model.load_adapter, at, "a")
    elif entry == "merge":
        call = functools.partial(
            fastlora.merge_checkpoint, good_adapters_and_base / "base", [at], at.with_name("out")
        )
    elif entry == "combine":
        call = functools.partial(fastlora.combine_adapters, [at], [1.0], at.with_name("out"))
    elif entry == "swap":
        fastlora.merge_adapter(fastlora.load_adapter(model, good_adapters_and_base / "adapter"))
        call = functools.partial(fastlora.swap_adapter, model, at)
    with untouched(model), pytest.raises((ValueError, FileNotFoundError), match=says):
        call()
    assert not at.with_name("out").exists()


@pytest.mark.parametrize("entry", ENTRIES)
def test_reader_names_subfolder_of_named_adapter(good_adapters_and_base, entry):
    says = r"expected adapter_config.json in .*both, .*; there is one in '.*both/alice': give that"
    assert_refused(entry, good_adapters_and_base / "both", good_adapters_and_base, says)


def test_load_adapter_refuses_file_instead_of_folder(good_adapters_and_base):
    with pytest.raises(FileNotFoundError, match=f"{WEIGHTS} is a file: give the folder"):
        fastlora.load_adapter(llama(), good_adapters_and_base / "adapter" / WEIGHTS)


def test_merge_checkpoint_names_git_lfs_pointer(tmp_path, good_adapters_and_base):
    for path in (good_adapters_and_base / "base").glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "model.safetensors").write_text(POINTER)
    with pytest.raises(ValueError, match=r"model\.safetensors: a Git LFS pointer"):
        fastlora.merge_checkpoint(tmp_path, [good_adapters_and_base / "adapter"], tmp_path / "out")


def test_modules_with_lookalike_names_load(tmp_path):
    """A module called default, and a parameter called alpha in one that is trained whole."""

    class Snake(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.alpha = nn.Parameter(torch.randn(3))

    def model() -> nn.Module:
        return nn.ModuleDict({"default": nn.ModuleDict({"up": nn.Linear(3, 3)}), "snake": Snake()})

    config = peft.LoraConfig(target_modules=["up"], modules_to_save=["snake"])
    theirs = peft.get_peft_model(model(), config)
    theirs.save_pretrained(str(tmp_path))
    assert "base_model.model.snake.alpha" in peft.get_peft_model_state_dict(theirs)
    assert json.loads((tmp_path / CONFIG).read_text())["modules_to_save"] == ["snake"]
    fastlora.load_adapter(model(), tmp_path)
