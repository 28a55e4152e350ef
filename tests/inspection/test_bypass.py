"""Layers of real models that are read without being called, as their source tells."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastlora
from fastlora import LoRAConfig
from fastlora.inspection.bypass import explain_bypass, find_reader
from fastlora.modules.layer import find_lora_layers
from tests.support.models import (
    bert,
    error,
    gpt2,
    llama,
    quiet,
    randomise_lora,
    t5,
    tokens,
    untouched,
)
from tests.support.readers import AUDIO, Handing, build_model, mamba, wavlm

pytestmark = quiet
ALL = LoRAConfig(r=2, target_modules="all-linear", init_lora_weights=False)
IDS = tokens(1, 5)
BERT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
}


def layout():
    sizes = {"coordinate_size": 4, "shape_size": 8, "visual_embed": False}
    biases = {"has_relative_attention_bias": True, "has_spatial_attention_bias": True}
    return build_model("LayoutLMv3", "Model", **BERT, **sizes, **biases)


def mobilebert():
    return build_model(
        "MobileBert", "ForMaskedLM", **BERT, embedding_size=16, intra_bottleneck_size=32
    )


READ = {
    "WavLM": (wavlm, {"q_proj", "k_proj", "v_proj", "out_proj"}, "WavLMAttention.torch_multi"),
    "Mamba": (mamba, {"dt_proj"}, "MambaMixer.forward"),
    "MobileBERT": (mobilebert, {"dense"}, "MobileBertLMPredictionHead.forward"),
    "LayoutLMv3": (layout, {"rel_pos_bias", "rel_pos_x_bias", "rel_pos_y_bias"}, "LayoutLMv3Enc"),
}


@pytest.mark.parametrize("name", READ)
def test_bypassed_layers_are_refused_or_skipped(name):
    build, ends, who = READ[name]
    model = build()
    if any(hasattr(module, "_relative_position_lookup") for module in model.modules()):
        pytest.skip("transformers 5.24 hands these to a helper: the first forward names them")
    linears = [n for n, m in model.named_modules() if type(m) is nn.Linear]
    found = {n for n in linears if explain_bypass(model, [n])}
    assert {n.rpartition(".")[2] for n in found - {"cls.predictions.decoder"}} == ends
    one = min(found)
    with untouched(model), pytest.raises(ValueError, match=f"{one}: {who}.* reads its weight"):
        fastlora.replace_linear(model, LoRAConfig(target_modules=[one]))
    with untouched(model), pytest.raises(ValueError, match="reads its weight and never calls it"):
        fastlora.MultiLoRAModel(model, target_modules=[one])
    fastlora.replace_linear(model, ALL)
    assert found <= set(fastlora.report(model).skipped)
    assert {n for n, _ in find_lora_layers(model)} == set(linears) - set(
        fastlora.report(model).skipped
    )


def test_every_replaced_wavlm_layer_gets_a_gradient():
    model = fastlora.replace_linear(wavlm(), ALL)
    model.config.layerdrop = 0.0  # in training it leaves out layers by chance
    model(**AUDIO).logits.square().mean().backward()
    assert all(layer.lora_A.grad.abs().sum() > 0 for _, layer in find_lora_layers(model))


@pytest.mark.parametrize("build", [llama, bert, gpt2, t5])
def test_ordinary_models_bypass_no_layer(build):
    model = build()
    names = [n for n, _ in model.named_modules() if n]
    assert not any(
        find_reader(model, n) for n in names if type(model.get_submodule(n)) is nn.Linear
    )


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)


class Grand(nn.Module):
    """Reads, and calls or hands on, what is two steps below."""

    def __init__(self):
        super().__init__()
        self.read, self.both, self.given = Block(), Block(), Block()
        self.listed = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    def forward(self, x):
        y = x @ self.read.inner.weight + x @ self.both.inner.weight + x @ self.given.inner.weight
        for layer in self.listed:
            y = y @ layer.weight
        return self.both.inner(y) + self.through(self.read, self.given.inner, y)


def test_explain_bypass_sees_distant_readers_and_calls():
    model = Grand()
    assert (
        explain_bypass(model, ["read.inner"]) == "Grand.forward reads its weight and never calls it"
    )
    assert (
        explain_bypass(model, ["listed.1"]) == "Grand.forward reads its weight and never calls it"
    )
    assert [find_reader(model, f"{n}.inner").called for n in ("both", "given", "read")] == [1, 1, 0]
    # Another forward on the instance, and a layer that is read by a function: not known.
    model.forward = lambda x: model.read.inner(x)
    assert explain_bypass(model, ["read.inner"]) is None
    assert explain_bypass(Handing(), ["inner"]) is None


def rwkv():
    sizes = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 4, "context_length": 16}
    return build_model("Rwkv", "ForCausalLM", **sizes, rescale_every=2)


def test_weight_rescaled_by_forward_takes_no_adapter():
    """Rwkv halves it in eval mode: the adapter's part would be twice what was trained."""
    model, name = rwkv(), "rwkv.blocks.3.attention.output"
    says = f"{name}: RwkvModel._rescale_layers changes its weight in place"
    with untouched(model), pytest.raises(ValueError, match=says):
        fastlora.replace_linear(model, LoRAConfig(target_modules=[name]))
    randomise_lora(fastlora.replace_linear(model, ALL))
    assert modes_differ(model) < 1e-3
    last = model.rwkv.blocks[3].attention
    last.output = randomise_lora(fastlora.FastLoRALinear.from_linear(last.output, r=2))
    assert modes_differ(model) > 1e-2


def modes_differ(model):
    with torch.no_grad():
        one, other = (model.train(mode)(IDS).logits for mode in (True, False))
    return error(other, one)
