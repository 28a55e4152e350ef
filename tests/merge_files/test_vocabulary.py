"""Merging embeddings saved along with adapters, as PEFT merges them."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from safetensors.torch import save_file

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

from fastlora.commands import main as cli  # noqa: E402
from fastlora.merge_files.vocabulary import Vocabulary  # noqa: E402
from tests.support.checkpoints import (  # noqa: E402
    CONFIG,
    INDEX,
    PREFIX,
    SINGLE,
    edit_adapter,
    edit_json,
    edit_tensors,
    load,
    merge,
    resized,
    save_adapter,
    save_base,
    save_resized,
    tensors,
)
from tests.support.helpers import same_bits  # noqa: E402
from tests.support.models import VOCABULARY, assert_agree, bert, gpt2, llama, logits, quiet  # noqa: E402

pytestmark = quiet
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
LARGER = VOCABULARY + 4


def ids(size: int) -> torch.Tensor:
    return torch.arange(size)[None]


def config(folder) -> dict:
    return json.loads((folder / CONFIG).read_text())


def merged_by_peft(at, base) -> None:
    """Into ``theirs``, as PEFT merges: onto a model of the adapter's vocabulary."""
    model = peft.PeftModel.from_pretrained(base, str(at / "adapter"))
    model.merge_and_unload().save_pretrained(at / "theirs")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("size", [LARGER, pytest.param(VOCABULARY - 7, marks=pytest.mark.full)])
def test_merge_of_resized_vocabulary_matches_peft(tmp_path, tied, size):
    at = tmp_path
    theirs = save_resized(at, size, tied=tied)
    merged_by_peft(at, resized(at / "base", size, seed=1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merge(at)
    got, want = tensors(at / "out"), tensors(at / "theirs")
    assert got.keys() == want.keys() == tensors(at / "base").keys()
    for name in (EMBEDDING, *([] if tied else [HEAD])):
        assert same_bits(got[name], want[name])
    assert config(at / "out") == config(at / "base") | {"vocab_size": size}
    assert config(at / "theirs")["vocab_size"] == size
    counted = json.loads((at / "out" / INDEX).read_text())["metadata"]
    assert counted["total_size"] == sum(t.nbytes for t in got.values())
    assert counted["total_parameters"] == sum(t.numel() for t in got.values())
    assert_agree(logits(load(at / "out"), ids(size)), logits(theirs, ids(size)))


def test_merge_command_converts_resized_vocabulary(tmp_path, capsys):
    at = tmp_path
    theirs = save_resized(at, LARGER)
    given = [str(at / "base"), str(at / "adapter"), "--out", str(at / "out"), "--dtype", "bf16"]
    assert cli.main(["merge", *given]) == 0
    assert f"from the adapter: {EMBEDDING} of {at / 'adapter'}: 101 rows instead of 97" in (
        capsys.readouterr().out
    )
    got = tensors(at / "out")
    assert same_bits(got[HEAD], theirs.get_output_embeddings().weight.bfloat16())
    assert load(at / "out").dtype == torch.bfloat16


def test_merge_takes_adapter_rows_for_resized_base(tmp_path):
    """Its last rows were drawn anew; an output layer with LoRA has its own merged on top."""
    at = tmp_path
    theirs = save_resized(at, LARGER, target_modules=["q_proj", "lm_head"])
    base = resized(at / "base", LARGER, seed=1)
    with torch.no_grad():
        base.get_input_embeddings().weight.copy_(theirs.get_input_embeddings().weight)
    (at / "base").rename(at / "small")
    save_base(at / "base", base)
    found = merge(at)
    assert found["lm_head"].gain == pytest.approx(1, abs=1e-4)
    assert_agree(logits(load(at / "out"), ids(LARGER)), logits(theirs, ids(LARGER)))


def test_merge_unties_output_layer_against_the_config(tmp_path):
    """transformers 5 ties what is the same, and PEFT writes what the merged model is."""
    at = tmp_path
    save_base(at / "base", size="1GB")
    edit_json(at / "base" / CONFIG, tie_word_embeddings=True)
    theirs = save_adapter(at / "adapter", load(at / "base"), target_modules=["lm_head", "q_proj"])
    merged_by_peft(at, load(at / "base"))
    merge(at)
    got, want = tensors(at / "out"), tensors(at / "theirs")
    assert got.keys() == want.keys()
    assert same_bits(got[EMBEDDING], want[EMBEDDING])
    assert config(at / "out")["tie_word_embeddings"] is False
    assert config(at / "theirs")["tie_word_embeddings"] is False
    assert_agree(logits(load(at / "out"), ids(97)), logits(theirs, ids(97)))
    written = {"is_encoder_decoder": True, "tie_word_embeddings": True}
    Vocabulary(untied=True).write(written)
    assert written["tie_word_embeddings"] is True  # T5 and its kind scale by it


def test_merge_resizes_vocabulary_of_gpt2_and_bert(tmp_path):
    at, model = tmp_path, gpt2(tie_word_embeddings=False)
    save_base(at / "base", model)
    model.resize_token_embeddings(LARGER, mean_resizing=False)
    chosen = {"target_modules": ["c_attn"], "fan_in_fan_out": True}
    theirs = peft.get_peft_model(model, peft.LoraConfig(**chosen))
    theirs.save_pretrained(str(at / "adapter"), save_embedding_layers=True)
    merge(at)
    given = ids(LARGER)[:, -20:]
    assert_agree(logits(load(at / "out"), given), logits(theirs.eval(), given))
    # The base's files have each of BERT's two tied pairs once, its adapters both.
    save_base(at / "bert" / "base", bert())
    theirs = peft.get_peft_model(bert(), peft.LoraConfig(target_modules=["query"]))
    theirs.save_pretrained(str(at / "bert" / "adapter"), save_embedding_layers=True)
    assert len(merge(at / "bert")) == 2
    assert tensors(at / "bert" / "out").keys() == tensors(at / "bert" / "base").keys()


def save_with_embeddings(at, *, tied: bool = False) -> None:
    """A base, and two adapters with both embeddings along."""
    save_base(at / "base", llama(tie_word_embeddings=tied))
    for name, target in (("adapter", "q_proj"), ("other", "v_proj")):
        theirs = peft.get_peft_model(load(at / "base"), peft.LoraConfig(target_modules=[target]))
        theirs.save_pretrained(str(at / name), save_embedding_layers=True)


def move(name: str, rows: slice | int):
    return lambda t: t[f"{PREFIX}{name}"][rows].add_(1.0)


def test_merge_takes_trained_rows_and_warns(tmp_path):
    at = tmp_path
    save_with_embeddings(at)
    edit_adapter(at, move(HEAD, 5))
    says = r"lm_head\.weight of .*adapter: 97 rows, 1 of them exchanged for what the base has"
    with pytest.warns(UserWarning, match=says):
        merge(at)
    moved = tensors(at / "out")[HEAD] - tensors(at / "base")[HEAD]
    assert moved.abs().sum(1).nonzero().flatten().tolist() == [5]


def test_merge_refuses_adapters_with_different_rows(tmp_path):
    """Copies of the base's, or of one another, are merged; of two others' rows there is no sum."""
    at = tmp_path
    save_with_embeddings(at)
    merge(at, "adapter", ("other", 0.5))
    assert same_bits(tensors(at / "out")[HEAD], tensors(at / "base")[HEAD])
    edit_adapter(at, move(HEAD, slice(90, None)))
    with pytest.raises(ValueError, match=r"they have different rows of lm_head\.weight"):
        merge(at, "adapter", ("other", 0.5))
    edit_tensors(at / "other" / "adapter_model.safetensors", move(HEAD, slice(90, None)))
    (at / "out").rename(at / "before")
    merge(at, "adapter", ("other", 0.5))
    moved = tensors(at / "out")[HEAD] - tensors(at / "base")[HEAD]
    assert moved.abs().sum(1).nonzero().flatten().tolist() == [*range(90, 97)]


def another_base(at) -> None:
    save_with_embeddings(at)
    save_adapter(at / "adapter", llama(seed=1), target_modules=["lm_head"])


def without_a_head(at) -> None:
    save_with_embeddings(at)
    model = load(at / "base")
    for path in [*(at / "base").glob("*.safetensors"), at / "base" / INDEX]:
        path.unlink()
    kept = {n: t.clone() for n, t in model.state_dict().items() if n != HEAD}
    save_file(kept, at / "base" / SINGLE, metadata={"format": "pt"})


REFUSED = {
    "another base's": (another_base, "97 of 97 rows of lm_head.weight .*freezes .*another base"),
    "the other embedding left out": (
        lambda at: save_resized(at, LARGER, target_modules=["lm_head"]),
        r"101 rows of lm_head\.weight, and none of model\.embed_tokens\.weight, which has 97",
    ),
    "tied, apart": (
        lambda at: save_with_embeddings(at, tied=True) or edit_adapter(at, move(HEAD, 3)),
        r"lm_head\.weight and model\.embed_tokens\.weight differ.* one tied weight",
    ),
    "no head": (without_a_head, r"it has lm_head\.weight along, which is not in"),
    "another width": (
        lambda at: save_with_embeddings(at)
        or edit_adapter(at, lambda t: t.update({f"{PREFIX}{HEAD}": torch.ones(97, 31)})),
        r"lm_head\.weight: expected floats of shape \(97, 32\)",
    ),
    "no embedding": (
        lambda at: save_with_embeddings(at)
        or edit_adapter(
            at,
            lambda t: t.update({f"{PREFIX}model.layers.0.mlp.up_proj.weight": torch.ones(48, 32)}),
        ),
        r"48 of 48 rows of model\.layers\.0\.mlp\.up_proj\.weight .*, which is no embedding",
    ),
    "not finite": (
        lambda at: save_with_embeddings(at)
        or edit_adapter(at, lambda t: t[f"{PREFIX}{HEAD}"].fill_(torch.inf)),
        r"lm_head\.weight: expected finite numbers",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_merge_refuses_embeddings_without_a_place(tmp_path, what):
    spoil, says = REFUSED[what]
    spoil(tmp_path)
    with pytest.raises(ValueError, match=says):
        merge(tmp_path)
    assert not (tmp_path / "out").exists()


def test_allow_partial_leaves_out_unplaced_embeddings(tmp_path):
    without_a_head(tmp_path)
    with pytest.warns(UserWarning, match=r"lm_head\.weight of .*adapter: not in the base"):
        merge(tmp_path, allow_partial=True)
    assert HEAD not in tensors(tmp_path / "out")
