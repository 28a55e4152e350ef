"""look_up_names finds the same tensors as transformers does when it loads."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import transformers
from safetensors.torch import load_file
from torch import nn

from fastlora.merge_files.loaded_names import look_up_names
from tests.support.models import quiet
from tests.support.vision_models import llava, qwen2_5_vl, randomise_weights

pytestmark = quiet


def dinov3() -> nn.Module:
    """The pattern of its table fits some of its own names, too."""
    config = transformers.DINOv3ViTConfig(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        image_size=8,
        patch_size=4,
    )
    return transformers.DINOv3ViTModel(config)


def nomic_bert() -> nn.Module:
    config = transformers.NomicBertConfig(
        vocab_size=8,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
    )
    return transformers.NomicBertModel(config)


@pytest.mark.parametrize("build", [llava, qwen2_5_vl, dinov3, nomic_bert])
def test_look_up_names_agrees_with_transformers(tmp_path, build: Callable[[], nn.Module]):
    """Of files as it saves them, and of files with the model's own names."""
    model = randomise_weights(build())
    model.save_pretrained(tmp_path)  # pyright: ignore[reportCallIssue]
    files = transformers.utils.SAFE_WEIGHTS_NAME
    stored, state = load_file(tmp_path / files), model.state_dict()
    found = look_up_names(model, stored)
    assert {*found.names.values(), *found.made} >= state.keys() - {"lm_head.weight"}
    for file, name in found.names.items():
        assert stored[file].equal(state[name])
    assert not {*found.names.values()} & found.made.keys()
    for name, sources in found.made.items():
        assert name in state
        assert all(stored[source].shape != state[name].shape for source in sources)
    assert bool(found.made) == (build is nomic_bert)
    assert all(name == own for own, name in look_up_names(model, state).names.items())
    assert (
        look_up_names(model, [*state, "nothing.of.it.weight"]).names.keys()
        >= state.keys() - found.made.keys()
    )
    assert "nothing.of.it.weight" not in look_up_names(model, ["nothing.of.it.weight"]).names


def test_look_up_names_raises_without_renaming_table(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers.conversion_mapping", None)
    with pytest.raises(LookupError, match="renamings cannot be read"):
        look_up_names(nn.Linear(2, 2), ["weight"])
