"""Copies of the base's embeddings in adapter files, as PEFT saves them, load and are served."""

# Every comparison runs over all ids, those that a resized vocabulary has more too.

from __future__ import annotations

import copy
import re
import warnings

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

import fastlora  # noqa: E402
from fastlora.adapters import base_copies  # noqa: E402
from tests.support.checkpoints import (  # noqa: E402
    PREFIX,
    edit_adapter,
    edit_tensors,
    load,
    resized,
    save_adapter,
    save_base,
    save_resized,
)
from tests.support.helpers import same_bits  # noqa: E402
from tests.support.models import (  # noqa: E402
    VOCABULARY,
    assert_agree,
    error,
    gpt2,
    llama,
    logits,
    quiet,
    randomise_lora,
    tokens,
    untouched,
)

pytestmark = quiet
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
FILE = "adapter_model.safetensors"
LARGER = VOCABULARY + 4


def every_id(size: int) -> torch.Tensor:
    return torch.stack([torch.arange(size), torch.arange(size - 1, -1, -1)])


def peft_on(base: nn.Module, folder) -> nn.Module:
    return peft.PeftModel.from_pretrained(base, str(folder)).eval()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("what", ["plain", "whole", "one whole", "head"])
@pytest.mark.parametrize("size", [LARGER, pytest.param(VOCABULARY - 7, marks=pytest.mark.full)])
def test_adapter_of_resized_vocabulary_loads_and_saves(tmp_path, tied, what, size):
    """Into a base that has been resized by the call that the refusal names; and saves its rows."""
    options = {
        "plain": {},
        "whole": {"modules_to_save": ["embed_tokens", "lm_head"]},
        "one whole": {"modules_to_save": ["lm_head"]},
        "head": {"target_modules": ["q_proj", "lm_head"]},
    }[what]
    save_resized(tmp_path, size, tied=tied, **options)
    given, base = every_id(size), tmp_path / "base"
    model = load(base)
    with untouched(model), pytest.raises(ValueError) as refused:
        fastlora.load_adapter(model, tmp_path / "adapter")
    call = re.search(r"has \d+ rows, 97 in this model: .* call (model\.\S+)", str(refused.value))
    assert call is not None
    assert call[1] == f"model.resize_token_embeddings({size})"
    bare = resized(base, size, seed=1)
    theirs, model = peft_on(copy.deepcopy(bare), tmp_path / "adapter"), copy.deepcopy(bare)
    lost = what == "head" and not tied and size > VOCABULARY
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if lost else "error")
        fastlora.load_adapter(model, tmp_path / "adapter")
    assert_agree(logits(model, given), logits(theirs, given), logits(bare, given))
    with fastlora.disable_adapter(model), theirs.disable_adapter():
        assert_agree(logits(model, given), logits(theirs, given))
    fastlora.save_adapter(model, tmp_path / "again")
    if not lost:
        again = peft_on(bare, tmp_path / "again")
        assert_agree(logits(again, given), logits(theirs, given))


def test_rows_left_out_by_peft_are_warned_of(tmp_path):
    """A target beside a resized vocabulary: PEFT's file has the head's new rows alone."""
    save_resized(tmp_path, LARGER, target_modules=["lm_head"])
    says = r"rows that were added to the vocabulary, but none for model\.embed_tokens\.weight"
    with pytest.warns(UserWarning, match=says):
        fastlora.load_adapter(resized(tmp_path / "base", LARGER, 1), tmp_path / "adapter")


@pytest.mark.parametrize("tied, init", [(False, True), (True, True), (False, "pissa")])
def test_adapter_on_output_layer_loads_from_peft(tmp_path, tied, init):
    base = save_base(tmp_path / "base", llama(tie_word_embeddings=tied, dtype=torch.bfloat16))
    theirs = save_adapter(
        tmp_path / "adapter", load(base), 0.5, target_modules=["q_proj", "lm_head"],
        init_lora_weights=init,
    )  # fmt: skip
    model, ids = load(base), tokens(2, 9)
    fastlora.load_adapter(model, tmp_path / "adapter", is_trainable=True)
    assert_agree(logits(model, ids), logits(theirs, ids), logits(load(base), ids))
    fastlora.load_adapter(model, tmp_path / "adapter")  # into layers that are there
    assert_agree(logits(model, ids), logits(theirs, ids))
    if init is True:
        assert all(".lora_" in name for name in fastlora.adapter_state_dict(model))
        widened = load(base, dtype=torch.float32)
        fastlora.load_adapter(widened, tmp_path / "adapter")
        assert error(logits(widened, ids), logits(theirs, ids).float()) < 0.1


def test_embeddings_of_other_names_load_with_biases(tmp_path):
    """Of a model whose embeddings are called otherwise, and whose output layer has a bias."""
    model = gpt2(tie_word_embeddings=False)
    model.lm_head = nn.Linear(32, VOCABULARY)
    config = peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True)
    theirs = peft.get_peft_model(copy.deepcopy(model), config)
    theirs.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=True)
    ours = fastlora.load_adapter(copy.deepcopy(model), tmp_path / "adapter")
    assert_agree(logits(ours, every_id(9)), logits(theirs.eval(), every_id(9)))
    edit_adapter(tmp_path, lambda t: t[f"{PREFIX}lm_head.bias"].add_(1))
    with pytest.warns(UserWarning, match=r"97 of 97 rows of lm_head\.bias of its own"):
        ours = fastlora.load_adapter(copy.deepcopy(model), tmp_path / "adapter")
    assert same_bits(ours.lm_head.bias, model.lm_head.bias + 1)


def base_with_embeddings_in_adapter(tmp_path, tied: bool = False) -> nn.Module:
    """A base, and an adapter with both embeddings along, which its user asked for; the model."""
    base = save_base(tmp_path / "base", llama(tie_word_embeddings=tied))
    theirs = peft.get_peft_model(load(base), peft.LoraConfig(target_modules=["q_proj"]))
    theirs.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=True)
    return load(base)


def move_row(name: str, rows: slice | int, by: float = 1.0):
    return lambda t: t[f"{PREFIX}{name}"][rows].add_(by)


def test_trained_rows_load_with_a_warning(tmp_path):
    model = base_with_embeddings_in_adapter(tmp_path)
    before = model.get_parameter(EMBEDDING).clone()
    edit_adapter(tmp_path, move_row(EMBEDDING, 5))
    says = r"1 of 97 rows of model\.embed_tokens\.weight of its own.*disable_adapter"
    with pytest.warns(UserWarning, match=says) as said:
        fastlora.load_adapter(model, tmp_path / "adapter")
    assert [w.filename for w in said] == [__file__]
    moved = (model.get_parameter(EMBEDDING) - before).abs().sum(1)
    assert moved.nonzero().flatten().tolist() == [5]
    with warnings.catch_warnings(), untouched(fresh := load(tmp_path / "base")):
        warnings.simplefilter("error")
        with pytest.raises(UserWarning):
            fastlora.load_adapter(fresh, tmp_path / "adapter")


REFUSED = {
    "tied, apart": (True, move_row(HEAD, 3), "differ, and in this model they are one tied weight"),
    "not of the embeddings": (
        False,
        lambda t: t.update({f"{PREFIX}model.norm.weight": torch.ones(32)}),
        r"unexpected model\.norm\.weight",
    ),
    "of another width": (
        False,
        lambda t: t.update({f"{PREFIX}{HEAD}": torch.ones(97, 31)}),
        r"unexpected lm_head\.weight",
    ),
    "no floats": (
        False,
        lambda t: t.update({f"{PREFIX}{HEAD}": torch.ones(97, 32, dtype=torch.int8)}),
        r"lm_head\.weight: expected floats",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_embeddings_that_are_no_copy_are_refused(tmp_path, what):
    tied, spoil, says = REFUSED[what]
    model = base_with_embeddings_in_adapter(tmp_path, tied)
    edit_adapter(tmp_path, spoil)
    with untouched(model), pytest.raises(ValueError, match=says):
        fastlora.load_adapter(model, tmp_path / "adapter")


def test_frozen_weight_of_another_base_is_refused(tmp_path):
    """PEFT freezes what has LoRA, so that nothing but another base can have been there."""
    save_adapter(tmp_path / "adapter", llama(seed=1), target_modules=["lm_head"])
    model = llama()
    says = r"97 of 97 rows of lm_head\.weight of its own, though PEFT freezes.*another base"
    with untouched(model), pytest.raises(ValueError, match=says):
        fastlora.load_adapter(model, tmp_path / "adapter")


def test_tied_modules_that_differ_are_refused(tmp_path):
    both = ["embed_tokens", "lm_head"]
    save_resized(tmp_path, LARGER, modules_to_save=both)
    edit_adapter(tmp_path, move_row("lm_head.modules_to_save.weight", 0))
    model = resized(tmp_path / "base", LARGER)
    with untouched(model), pytest.raises(ValueError, match=r"lm_head\.modules_to_save\.weight and"):
        fastlora.load_adapter(model, tmp_path / "adapter")


def test_base_of_several_or_merged_adapters_stays(tmp_path):
    base_with_embeddings_in_adapter(tmp_path)
    config = fastlora.LoRAConfig(target_modules=["q_proj"])
    several = load(tmp_path / "base")
    fastlora.replace_linear(several, config, adapter_names=["a", "b"])
    fastlora.load_adapter(several, tmp_path / "adapter", adapter_name="a")
    model = fastlora.load_adapter(load(tmp_path / "base"), tmp_path / "adapter")
    fastlora.merge_adapter(model)
    fastlora.swap_adapter(model, tmp_path / "adapter")
    edit_adapter(tmp_path, move_row(HEAD, 3))
    with untouched(several), pytest.raises(ValueError, match="the base is that of all adapters"):
        fastlora.load_adapter(several, tmp_path / "adapter", adapter_name="a")
    with untouched(model), pytest.raises(ValueError, match=r"1 of 97 .* which is not swapped"):
        fastlora.swap_adapter(model, tmp_path / "adapter")
    save_adapter(tmp_path / "head", load(tmp_path / "base"), target_modules=["lm_head"])
    model = fastlora.load_adapter(load(tmp_path / "base"), tmp_path / "head")
    fastlora.merge_adapter(model)
    with untouched(model), pytest.raises(ValueError, match=r"merged here and cannot be compared"):
        fastlora.swap_adapter(model, tmp_path / "head")


@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.full)]
)
def test_server_accepts_copies_equal_to_base(tmp_path, dtype):
    base = save_base(tmp_path / "base", llama(dtype=dtype))
    targets = ["q_proj", "lm_head"]
    theirs = save_adapter(tmp_path / "adapter", load(base), 0.5, target_modules=targets)
    server = fastlora.MultiLoRAModel(load(base), target_modules=targets)
    server.load_adapter(tmp_path / "adapter", "a")
    ids = tokens(2, 7)
    served = server(ids, adapter_names=["a", None]).logits
    assert_agree(served[:1], logits(theirs, ids[:1]), served[1:])
    edit_tensors(tmp_path / "adapter" / FILE, move_row("lm_head.base_layer.weight", -1))
    with pytest.raises(
        ValueError, match=r"the last 1 of 97 rows of lm_head\.weight .*fastlora merge"
    ):
        server.load_adapter(tmp_path / "adapter", "a")
    assert torch.equal(server(ids, adapter_names=["a", None]).logits, served)


def test_server_refuses_another_vocabulary(tmp_path):
    save_resized(tmp_path, LARGER)
    for size in (VOCABULARY, LARGER):
        model = resized(tmp_path / "base", size, seed=1)
        server = fastlora.MultiLoRAModel(model, target_modules=["q_proj"])
        with pytest.raises(ValueError, match="the served base is everybody's: serve a model that"):
            server.load_adapter(tmp_path / "adapter", "a")
        assert server.adapters == ()
    # Once the base has the rows there is nothing to refuse.
    model = fastlora.load_adapter(resized(tmp_path / "base", size, 1), tmp_path / "adapter")
    server = fastlora.MultiLoRAModel(fastlora.merge_and_unload(model), target_modules=["q_proj"])
    server.load_adapter(tmp_path / "adapter", "a")


@pytest.mark.parametrize("size", [pytest.param(VOCABULARY, marks=pytest.mark.full), LARGER])
def test_combine_adapters_keeps_equal_copies_only(tmp_path, size):
    """Of an adapter whose output layer is a target, and of one that has both embeddings as such."""
    save_base(tmp_path / "base", llama())
    bare = resized(tmp_path / "base", size)
    head = save_adapter(tmp_path / "head", copy.deepcopy(bare), target_modules=["lm_head"])
    both = peft.get_peft_model(copy.deepcopy(bare), peft.LoraConfig(target_modules=["q_proj"]))
    randomise_lora(both, 0.05).save_pretrained(str(tmp_path / "both"), save_embedding_layers=True)
    folders = [tmp_path / "head", tmp_path / "both"]
    fastlora.combine_adapters(folders, [1.0, 1.0], tmp_path / "out", combination_type="cat")
    held = load_file(tmp_path / "out" / FILE)
    plain = {name.removeprefix(PREFIX): t for name, t in held.items() if ".lora_" not in name}
    assert plain.keys() == {"lm_head.base_layer.weight", EMBEDDING}
    assert all(
        same_bits(t, bare.get_parameter(base_copies.strip_peft_wrappers(n)))
        for n, t in plain.items()
    )
    base, given = resized(tmp_path / "base", size, seed=1), every_id(size)
    theirs = peft_on(copy.deepcopy(base), tmp_path / "out")
    ours = fastlora.load_adapter(base, tmp_path / "out")
    assert_agree(logits(ours, given), logits(theirs, given))
    assert error(logits(ours, given), logits(head, given)) > 1e-3
    # In float32 on the one side, in the adapters' half on the other.
    edit_tensors(tmp_path / "both" / FILE, lambda t: {n: t[n].bfloat16() for n in t})
    fastlora.combine_adapters(folders, [1.0, 1.0], tmp_path / "half", combination_type="cat")
    edit_tensors(tmp_path / "both" / FILE, move_row(HEAD, 3))
    says = r"head and .*both: they have different rows of lm_head\.weight"
    with pytest.raises(ValueError, match=says):
        fastlora.combine_adapters(folders, [1.0, 1.0], tmp_path / "no", combination_type="cat")
    spoil = {f"{PREFIX}model.norm.weight": torch.ones(32)}
    edit_tensors(tmp_path / "head" / FILE, lambda t: t.update(spoil))
    with pytest.raises(ValueError, match=r"unexpected .*model\.norm\.weight"):
        fastlora.combine_adapters(folders, [1.0, 1.0], tmp_path / "no", combination_type="cat")
    assert not (tmp_path / "no").exists()
