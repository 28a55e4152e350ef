"""replace_linear refuses or skips layers that cannot have LoRA, and names without a layer."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch import nn

import fastlora
from fastlora import FastLoRALinear, LoRAConfig
from fastlora.modules.layer import find_lora_layers
from tests.support.helpers import same_bits
from tests.support.models import (
    llama,
    quiet,
    randomise_lora,
    untouched,
)

pytestmark = quiet


ALL = LoRAConfig(r=4, target_modules="all-linear")


def replaced_names(model: nn.Module) -> set[str]:
    return {name for name, _ in find_lora_layers(model)}


class Odd(nn.Linear):
    pass


class Own(transformers.pytorch_utils.Conv1D):
    pass


class Zoo(nn.Module):
    """Two linears that can have LoRA, and company that cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.good = nn.Linear(8, 8)
        self.table = nn.Embedding(8, 8)
        self.conv = nn.Conv1d(8, 8, 1)
        self.gpt = transformers.pytorch_utils.Conv1D(8, 8)
        self.own = Own(8, 8)
        self.mha = nn.MultiheadAttention(8, 2)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True)
        self.odd = Odd(8, 8)
        self.fp8 = nn.Linear(8, 8).to(torch.float8_e4m3fn)
        self.shaped = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))


BYPASSED = "reads its weight and"


CANNOT = {
    "table": "not an nn.Linear",
    "conv": "not an nn.Linear",
    "own": "a subclass of Conv1D with behaviour of its own",
    "mha": "not an nn.Linear",
    "mha.out_proj": BYPASSED,
    "encoder.self_attn.out_proj": BYPASSED,
    "encoder.linear1": BYPASSED,
    "encoder.linear2": BYPASSED,
    "odd": "behaviour of its own",
    "fp8": "float8",
    "shaped": "behaviour of its own",
}


@pytest.mark.parametrize("name", CANNOT)
def test_replace_linear_refuses_unsupported_layer_when_named(name):
    model = Zoo()
    with untouched(model), pytest.raises(ValueError, match=f"{name}: .*{CANNOT[name]}"):
        fastlora.replace_linear(model, LoRAConfig(target_modules=["good", name]))


def test_all_linear_skips_and_reports_unsupported_layers():
    model = fastlora.replace_linear(Zoo(), ALL)
    assert replaced_names(model) == {"good", "gpt"}
    skipped = fastlora.report(model).skipped
    assert set(skipped) == {n for n in CANNOT if n not in ("table", "conv", "mha")}
    assert all(CANNOT[name] in reason for name, reason in skipped.items())


def test_encoder_fast_path_of_torch_bypasses_lora():
    """Why its linears are refused: the fast path computes as if they had no LoRA."""
    encoder = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True).eval().requires_grad_(False)
    bypassed, x = copy.deepcopy(encoder), torch.randn(2, 3, 8)
    layer = randomise_lora(FastLoRALinear.from_linear(bypassed.linear1)).requires_grad_(False)
    bypassed.linear1 = layer
    with torch.no_grad():
        assert same_bits(bypassed(x), encoder(x))


@pytest.mark.parametrize("failing", [1, 5, 14])
def test_replace_linear_changes_nothing_when_construction_fails(monkeypatch, failing):
    model, calls = llama(), []
    build = FastLoRALinear._share.__func__

    def sharing(cls, *args, **kwargs):
        calls.append(args)
        if len(calls) == failing:
            raise MemoryError("no room")
        return build(cls, *args, **kwargs)

    monkeypatch.setattr(FastLoRALinear, "_share", classmethod(sharing))
    with untouched(model), pytest.raises(MemoryError):
        fastlora.replace_linear(model, ALL)


@pytest.mark.parametrize("model", [None, "llama", 3])
def test_replace_linear_refuses_what_is_no_model(model):
    with pytest.raises(TypeError, match="model: expected"):
        fastlora.replace_linear(model, ALL)
    with pytest.raises(ValueError, match="from_linear"):
        fastlora.replace_linear(nn.Linear(4, 4), ALL)


def test_report_prints_each_skip_reason_once():
    skipped = {"a": "too large", "b": "excluded", "c": "too large", "d": "too large"}
    said = str(fastlora.Report(skipped=skipped))
    assert said.splitlines()[3:] == ["skipped a and 2 more: too large", "skipped b: excluded"]


@pytest.mark.parametrize(
    "options, says",
    [
        ({"target_modules": ["q_proj", "w_proj"]}, "target_modules: .* is called 'w_proj'$"),
        ({"rank_pattern": {"q_prj": 2}}, "rank_pattern: .* is called 'q_prj'$"),
        ({"alpha_pattern": {r"layers\.9\..*": 2}}, "alpha_pattern: .* is called 'layers"),
    ],
)
def test_replace_linear_warns_of_names_without_layer(options, says):
    config = LoRAConfig(**{"target_modules": ["q_proj"], **options})
    with pytest.warns(UserWarning, match=says):
        fastlora.replace_linear(llama(), config)


def test_replace_linear_does_not_warn_of_matching_names(recwarn):
    names = ["q_proj", "layers.1.mlp.up_proj", "k_proj"]
    pattern = {"q_proj": 2, r"layers\.1\..*": 3}
    fastlora.replace_linear(
        llama(),
        LoRAConfig(target_modules=names, rank_pattern=pattern, exclude_modules=["k_proj"]),
    )
    assert not [w for w in recwarn if "is called" in str(w.message)]


@pytest.mark.parametrize("targets", [".*", [f"{n}.x" for n in range(500)], r".*(q|norm).*|lm_.*"])
def test_target_error_about_many_modules_is_short(targets):
    model = llama(num_hidden_layers=12)
    with untouched(model), pytest.raises(ValueError, match="target_modules: ") as caught:
        fastlora.replace_linear(model, LoRAConfig(target_modules=targets))
    assert len(str(caught.value)) < 1500


def test_warning_of_unmatched_names_is_cut_off():
    names = ["q_proj", *(f"none_{n}" for n in range(300))]
    with pytest.warns(UserWarning, match="'none_0', .* and 280 more$"):
        fastlora.replace_linear(llama(), LoRAConfig(target_modules=names))
