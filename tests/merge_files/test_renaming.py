"""Merging into checkpoints whose tensors transformers renames while loading."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.support.checkpoints import (
    CONFIG,
    PREFIX,
    SINGLE,
    edit_adapter,
    edit_json,
    edit_tensors,
    merge,
    save_adapter,
    save_base,
    tensors,
)
from tests.support.models import assert_agree, llama, quiet
from tests.support.vision_models import gemma3, image_logits, llava, qwen2_5_vl, randomise_weights

pytestmark = quiet

# Names of the hub's files: before transformers 4.52, which put the towers below `model`.
HUB: dict[Callable[[], nn.Module], tuple[str, str]] = {
    llava: ("language_model.model.layers.0.", "vision_tower.vision_model.encoder."),
    gemma3: ("language_model.model.layers.0.", "vision_tower.vision_model.encoder."),
    qwen2_5_vl: ("model.layers.0.", "visual.blocks.0."),
}


def save(at: Path, build: Callable[[], nn.Module], **options: Any) -> Any:
    """The base with the hub's names, an adapter of every linear; PEFT's model, unmerged."""
    save_base(at / "base", randomise_weights(build()), "1GB")
    edit_tensors(at / "base" / SINGLE, lambda t: {hub_name(name): t[name] for name in t})
    return save_adapter(at / "adapter", randomise_weights(build()), 0.3, **options)


def hub_name(name: str) -> str:
    """transformers 5 leaves a part of the tower's names out when it saves a model it has made."""
    return name.replace("vision_tower.", "vision_tower.vision_model.")


def load(folder: Path) -> Any:
    return transformers.AutoModelForImageTextToText.from_pretrained(folder).eval()


def old_name(name: str) -> str:
    """An adapter's name of before 4.52, when PEFT saw the modules as the hub's files have them."""
    name = name.removeprefix(PREFIX)
    name = name.replace("model.language_model.", "language_model.model.")
    return PREFIX + hub_name(name.replace("model.vision_tower.", "vision_tower.")).replace(
        "model.multi_modal_projector.", "multi_modal_projector."
    )


@pytest.mark.parametrize("build", HUB, ids=lambda build: build.__name__)
def test_merged_renamed_checkpoint_matches_peft(tmp_path, build):
    """Both towers of it, whose names in files stay those that every reader of the base knows."""
    theirs = save(tmp_path, build)
    before = tensors(tmp_path / "base")
    assert all(any(name.startswith(start) for name in before) for start in HUB[build])
    base = image_logits(load(tmp_path / "base"))
    found = merge(tmp_path)
    layers = {name for name, m in theirs.get_base_model().named_modules() if hasattr(m, "lora_A")}
    assert len(found) == len(layers)
    assert not layers & found.keys()
    after = tensors(tmp_path / "out")
    assert after.keys() == before.keys()
    assert {n for n in after if not torch.equal(after[n], before[n])} == {
        f"{n}.weight" for n in found
    }
    assert_agree(image_logits(load(tmp_path / "out")), image_logits(theirs), base)
    merged = theirs.merge_and_unload().state_dict()
    for name, tensor in load(tmp_path / "out").state_dict().items():
        torch.testing.assert_close(tensor, merged[name])


@pytest.mark.parametrize("new", [False, True], ids=["base of the hub", "base with new names"])
def test_merge_accepts_adapter_with_old_names(tmp_path, new):
    theirs = save(tmp_path, llava)
    edit_adapter(tmp_path, lambda t: {old_name(name): t[name] for name in t})
    if new:
        state = randomise_weights(llava()).state_dict()
        save_file(state, tmp_path / "base" / SINGLE, metadata={"format": "pt"})
    base = image_logits(load(tmp_path / "base"))
    assert len(merge(tmp_path)) == 22
    assert_agree(image_logits(load(tmp_path / "out")), image_logits(theirs), base)


def test_merge_renames_output_layer_of_adapter(tmp_path):
    """Its own name changes too, and PEFT saves a copy of its weight along."""
    theirs = save(tmp_path, llava, target_modules=["lm_head", "v_proj"])
    base = image_logits(load(tmp_path / "base"))
    assert "language_model.lm_head" in merge(tmp_path)
    assert_agree(image_logits(load(tmp_path / "out")), image_logits(theirs), base)


def test_merge_refuses_layers_no_renaming_explains(tmp_path):
    """Named by kind and number; what is asked for is left out and nothing else."""
    save(tmp_path, llava)

    def deeper(t: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            n.replace("layers.0.self", "layers.8.self").replace(
                "layers.1.self", "layers.9.self"
            ): t[n]
            for n in t
        }

    edit_adapter(
        tmp_path, lambda t: {n: v for n, v in deeper(t).items() if "vision" not in n or "mlp" in n}
    )
    with pytest.raises(ValueError, match="8 of its 18 layers are not in") as refused:
        merge(tmp_path)
    assert "model.language_model.layers.*.self_attn.q_proj (2)" in str(refused.value)
    assert "allow_partial" in str(refused.value)
    with pytest.warns(UserWarning, match="model.language_model.layers.9.self_attn.v_proj of"):
        assert len(merge(tmp_path, allow_partial=True)) == 10


def test_merge_refuses_two_weights_for_one_layer(tmp_path):
    """Which of the two transformers takes depends on their order."""
    save(tmp_path, llava)
    name = "language_model.model.layers.1.mlp.up_proj.weight"
    both = "model.language_model.layers.1.mlp.up_proj.weight"
    edit_tensors(tmp_path / "base" / SINGLE, lambda t: t.update({both: t[name] * 2}))
    with pytest.raises(ValueError, match=f"{name} and {both}, which transformers"):
        merge(tmp_path)
    assert not (tmp_path / "out").exists()


def test_merge_refuses_name_that_fits_two_layers(tmp_path):
    """As it stands one of the files' tensors, as the model's another."""
    save(tmp_path, llava, target_modules=r".*language_model.layers.1.mlp.up_proj")
    name = "language_model.model.layers.1.mlp.up_proj"
    both = "model.language_model.layers.1.mlp.up_proj"

    def double(t: dict[str, Tensor]) -> None:
        t[f"{both}.weight"] = t[f"{name}.weight"] * 2

    edit_tensors(tmp_path / "base" / SINGLE, double)
    with pytest.raises(ValueError, match=f"{both} may be {name} or {both} of"):
        merge(tmp_path)
    assert not (tmp_path / "out").exists()


def test_merge_refuses_weights_computed_while_loading(tmp_path):
    """Files with q, k and v in one tensor, a model with three: refused, partly too."""
    config = transformers.NomicBertConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    model = transformers.NomicBertModel(config)
    save_base(tmp_path / "base", model, "1GB")
    assert "encoder.layers.0.attn.Wqkv.weight" in tensors(tmp_path / "base")
    save_adapter(tmp_path / "adapter", transformers.NomicBertModel(config))
    for partial in (False, True):
        with pytest.raises(ValueError, match=r"computes while loading .*q_proj.*Wqkv"):
            merge(tmp_path, allow_partial=partial)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("partial", [False, True])
def test_merge_refuses_renamed_layers_without_transformers(tmp_path, monkeypatch, partial):
    """What it would know is not guessed: half a model is not offered."""
    save(tmp_path, llava)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(
        ValueError, match=r"20 of its 22 layers are not in .* is not installed"
    ) as said:
        merge(tmp_path, allow_partial=partial)
    assert "partial" not in str(said.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"architectures": ["OurOwn"]}, r"no model of architectures=\['OurOwn'\]"),
        ({"model_type": "unheard-of"}, "cannot build LlavaForConditionalGeneration"),
    ],
)
def test_merge_refuses_renamed_layers_of_unknown_models(tmp_path, changes, says):
    save(tmp_path, llava)
    edit_json(tmp_path / "base" / CONFIG, **changes)
    with pytest.raises(ValueError, match=says):
        merge(tmp_path)


def test_merge_of_matching_names_needs_no_transformers(tmp_path, monkeypatch):
    save_base(tmp_path / "base")
    save_adapter(tmp_path / "adapter", llama())
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert len(merge(tmp_path)) == 14


@pytest.mark.full
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_merge_resizes_vocabulary_under_renamed_tensors(tmp_path):
    """Rows that PEFT saves along go to the files' own names, the size into the text's config."""
    save_base(tmp_path / "base", randomise_weights(llava()), "1GB")
    edit_tensors(tmp_path / "base" / SINGLE, lambda t: {hub_name(name): t[name] for name in t})
    model = load(tmp_path / "base")
    model.resize_token_embeddings(70)
    settings = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    theirs = peft.get_peft_model(model, settings).eval()
    theirs.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    merge(tmp_path)
    merged = load(tmp_path / "out")
    assert merged.config.text_config.vocab_size == 70
    assert tensors(tmp_path / "out").keys() == tensors(tmp_path / "base").keys()
    assert_agree(image_logits(merged), image_logits(theirs))
