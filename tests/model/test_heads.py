"""replace_linear warns of a new classifier head that the adapter's files would not hold."""

from __future__ import annotations

import warnings

import pytest
import transformers
from torch import nn

import fastlora
from fastlora import LoRAConfig
from tests.support.models import bert, gpt2, quiet

pytestmark = quiet
ALL = {"r": 2, "target_modules": "all-linear"}
SOME = {"r": 2, "target_modules": ["query"]}


def collect_warnings(model: nn.Module, **options) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fastlora.replace_linear(model, LoRAConfig(**options))
    return [str(w.message) for w in caught if "task_type" in str(w.message)]


def load_model(kind: str, folder, **options) -> nn.Module:
    return getattr(transformers, kind).from_pretrained(folder, **options)


def test_new_classifier_head_is_warned_of(tmp_path):
    bert().save_pretrained(tmp_path)
    (text,) = collect_warnings(load_model("BertForSequenceClassification", tmp_path), **ALL)
    assert "task_type=None: the classifier of BertForSequenceClassification is new" in text
    assert "the checkpoint was a BertForMaskedLM" in text
    assert 'give task_type="SEQ_CLS", or modules_to_save=["classifier"]' in text
    # One that nobody adapts is lost as well.
    assert len(collect_warnings(load_model("BertForSequenceClassification", tmp_path), **SOME)) == 1
    (text,) = collect_warnings(load_model("BertForTokenClassification", tmp_path), **ALL)
    assert 'task_type="TOKEN_CLS"' in text
    assert len(collect_warnings(bert(head="SequenceClassification"), **ALL)) == 1
    assert (
        "the score of GPT2"
        in collect_warnings(gpt2(head="SequenceClassification"), **ALL, fan_in_fan_out=True)[0]
    )


@pytest.mark.parametrize(
    "more",
    [
        {"task_type": "SEQ_CLS"},
        {"modules_to_save": ["classifier"]},
    ],
)
def test_saved_classifier_head_is_not_warned_of(tmp_path, more):
    bert().save_pretrained(tmp_path)
    assert (
        collect_warnings(load_model("BertForSequenceClassification", tmp_path), **ALL, **more) == []
    )


def test_head_of_checkpoint_is_not_warned_of(tmp_path):
    bert(head="SequenceClassification").save_pretrained(tmp_path)
    assert collect_warnings(load_model("BertForSequenceClassification", tmp_path), **ALL) == []
    # In a model that is new as a whole, nothing is lost that was there.
    assert collect_warnings(bert(head="SequenceClassification"), **SOME) == []
    assert collect_warnings(bert(), **ALL) == []
    assert collect_warnings(nn.ModuleDict({"classifier": nn.Linear(4, 4)}), **ALL) == []
