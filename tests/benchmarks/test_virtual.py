"""PEFT's prefix and prompt tuning are measured only where generate keeps their tokens."""

import warnings

import pytest

pytest.importorskip("peft", reason="PEFT is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

import peft
import torch
import transformers
from torch import nn

from benchmarks.harness import gate, measurement
from benchmarks.harness.case import Absent, Case
from benchmarks.peers import virtual
from benchmarks.suites.generate import Generate
from tests.benchmarks.virtual_tuning import (
    forget_explanations,
    keep_virtual_tokens,
    lose_virtual_tokens_from,
)
from tests.support.models import llama, tokens

SHAPE = {"B": 2, "L": 4, "new": 2, "H": 64, "I": 64, "layers": 1, "R": 4, "S": 1}
KINDS = ["prefix", "prompt"]


class Old(nn.Module):
    def forward(self, input_ids, past_key_values=None):
        return past_key_values


class New(nn.Module):
    def forward(self, input_ids, cache=None, **others):
        return cache


@pytest.mark.parametrize("kind, name", [(Old, "past_key_values"), (New, "cache")])
def test_name_cache_argument_matches_the_forward_signature(kind, name):
    assert virtual.name_cache_argument(kind()) == name
    assert kind()(None, **{name: "earlier"}) == "earlier"


def test_installed_transformers_accepts_the_cache_argument():
    model, ids = llama(), tokens(1, 5)
    past = transformers.DynamicCache()
    name = virtual.name_cache_argument(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first = model(input_ids=ids[:, :3], **{name: past}).logits
        rest = model(input_ids=ids[:, 3:], **{name: past}).logits
    torch.testing.assert_close(torch.cat([first, rest], 1), model(input_ids=ids).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_virtual_tokens_are_measured_when_generate_keeps_them(kind, monkeypatch):
    keep_virtual_tokens(monkeypatch)
    assert virtual.explain_loss(kind) is None
    assert virtual.make_config(kind, 7).num_virtual_tokens == 7


@pytest.mark.parametrize("token", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_virtual_tokens_are_absent_when_generate_loses_them(kind, token, monkeypatch):
    lose_virtual_tokens_from(token, monkeypatch)
    reason = virtual.explain_loss(kind)
    assert f"PEFT {peft.__version__}'s {kind} tuning" in reason
    assert f"transformers {transformers.__version__}" in reason
    assert f"from token {token} on its logits are not forward's" in reason
    with pytest.raises(Absent, match="generate gets it wrong"):
        virtual.make_config(kind, 4)
    case = Case(Generate(one=True), "cpu", "fp32", SHAPE)
    chosen = ("base", "torch", f"peft-{kind}")
    case.work.providers = {name: case.work.providers[name] for name in chosen}
    verdicts = gate.check(case, measurement.SEED)
    assert verdicts.pop(f"peft-{kind}") == gate.Verdict("absent", reason)
    assert {verdict.status for verdict in verdicts.values()} == {"ok"}


@pytest.mark.parametrize("kind", KINDS)
def test_explain_loss_finds_forward_that_ignores_virtual_tokens(kind, monkeypatch):
    forget_explanations(monkeypatch)
    monkeypatch.setattr(
        peft.PeftModelForCausalLM,
        "forward",
        lambda self, *args, **kwargs: self.base_model(*args, **kwargs),
    )
    assert "forward ignores it" in virtual.explain_loss(kind)


@pytest.mark.parametrize("kind", KINDS)
def test_explain_loss_returns_errors_as_reason(kind, monkeypatch):
    def refuse(*_, **__):
        raise KeyError("cache_position")

    forget_explanations(monkeypatch)
    monkeypatch.setattr(peft.PeftModelForCausalLM, "generate", refuse)
    assert "KeyError: 'cache_position'" in virtual.explain_loss(kind)


def test_explain_loss_leaves_random_state_unchanged(monkeypatch):
    forget_explanations(monkeypatch)
    before = torch.get_rng_state()
    virtual.explain_loss("prompt")
    assert torch.equal(torch.get_rng_state(), before)
