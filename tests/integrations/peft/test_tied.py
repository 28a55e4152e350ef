"""A patched PEFT model refuses to merge into a weight that another module reads."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

import fastlora  # noqa: E402
from tests.support.models import (  # noqa: E402
    assert_agree,
    llama,
    logits,
    quiet,
    randomise_lora,
    tokens,
    untouched,
)

pytestmark = [quiet, pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`")]


def tied_model(*targets: str) -> nn.Module:
    config = peft.LoraConfig(target_modules=list(targets), r=4)
    model = peft.get_peft_model(llama(tie_word_embeddings=True), config)
    model.add_adapter("q", peft.LoraConfig(target_modules=["q_proj"], r=4))
    with torch.no_grad():
        for name, parameter in randomise_lora(model).named_parameters():
            if "lora_embedding_A" in name:
                parameter.normal_()
    return model.eval()


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_merge_refuses_tied_weight_and_changes_nothing(target):
    model, ids = tied_model(target, "v_proj"), tokens(2, 7)
    plain = copy.deepcopy(model)
    before = logits(plain, ids)
    plain.merge_adapter()
    assert (logits(plain, ids) - before).abs().max() > 1  # PEFT only warns, and is wrong
    fastlora.patch_peft(model)
    said = rf"{target}: its weight is tied with .*, which merging would change too; .*untie it"
    for merge in (model.merge_adapter, model.merge_and_unload):
        with untouched(model), pytest.raises(RuntimeError, match=said):
            merge()
        with untouched(model), pytest.raises(RuntimeError, match=said):
            merge(adapter_names=["q", "default"])
    # The other adapter is for weights that nobody else reads, and nothing is in the way of that.
    model.set_adapter("q")
    before = logits(model, ids)
    model.merge_adapter()
    assert_agree(logits(model, ids), before)
    model.unmerge_adapter()
    fastlora.unpatch_peft(model)
    model.set_adapter("default")
    model.merge_adapter()


def test_merge_works_once_weights_are_untied():
    model, ids = tied_model("lm_head", "v_proj"), tokens(2, 7)
    fastlora.patch_peft(model)
    before = logits(model, ids)
    base = model.get_output_embeddings().base_layer
    base.weight = nn.Parameter(base.weight.detach().clone())
    model.config.tie_word_embeddings = False
    assert_agree(logits(model.merge_and_unload(), ids), before)


class Twice(nn.Module):
    """One layer at two places."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.again, self.last = self.first, nn.Linear(8, 8)

    def forward(self, x):
        return self.last(self.again(self.first(x)))


@pytest.mark.parametrize("how", ["merge_adapter", "merge_and_unload"])
def test_merge_refuses_layer_at_two_places(how):
    """PEFT adapts the first of them alone."""
    settings = peft.LoraConfig(target_modules=["first", "again"], init_lora_weights=False)
    model = peft.get_peft_model(Twice(), settings)
    fastlora.patch_peft(model)
    with untouched(model), pytest.raises(RuntimeError, match=r"tied with again\.weight"):
        getattr(model, how)()
