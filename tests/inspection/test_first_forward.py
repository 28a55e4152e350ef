"""The first forward warns of layers whose weight was read without a call."""

from __future__ import annotations

import copy
import pickle
import threading
import warnings

import pytest
import torch
from torch import nn

import fastlora
from fastlora import LoRAConfig
from fastlora.modules.layer import find_lora_layers
from tests.support.models import llama, quiet, randomise_lora, tokens
from tests.support.readers import AUDIO, Handing, build_model, count_watch_hooks, mamba, wavlm

pytestmark = quiet
ALL = LoRAConfig(r=2, target_modules="all-linear", init_lora_weights=False)
X = torch.randn(2, 4)


def model_with_adapters(model=None, **options):
    return fastlora.replace_linear(model or Handing(), ALL, **options)


def warnings_of_bypass(call, *args, **kwargs):
    """What it warns of, of layers that were not called."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call(*args, **kwargs)
    return [str(w.message) for w in caught if "were never called" in str(w.message)]


@pytest.fixture(autouse=True)
def _no_graphs():
    """Beside compiled ones, of whatever model, hooks stay."""
    torch.compiler.reset()


def test_bypassed_layer_is_warned_of_once():
    model = randomise_lora(model_with_adapters())
    (text,) = warnings_of_bypass(model, X)
    assert "read: inner (by the model, a Handing). What their adapters add is not" in text
    assert "unused" not in text
    assert (count_watch_hooks(model), torch._C._len_torch_function_stack()) == (0, 0)
    assert warnings_of_bypass(model, X) == []
    found = fastlora.report(model)
    assert (found.bypassed, len(found.replaced)) == ({"inner": "Handing"}, 3)
    assert "without effect: inner: never called, but read by Handing" in str(fastlora.report(model))
    # It is so: the adapter changes nothing.
    before = model(X)
    model.inner.lora_B.data.zero_()
    assert torch.equal(model(X), before)


def test_called_or_unused_layer_gives_no_warning():
    model = model_with_adapters(Handing(read=False))
    assert warnings_of_bypass(model, X) == []
    assert fastlora.report(model).bypassed == {}


def jamba():
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "pad_token_id": 0}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    places = {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_offset": 1}
    experts = {"num_experts": 4, "use_mamba_kernels": False}
    return build_model("Jamba", "ForCausalLM", **sizes, **heads, **places, **experts)


def switch():
    """Experts that are linears, most of which see no token."""
    sizes = {"vocab_size": 97, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4}
    more = {"num_experts": 8, "decoder_start_token_id": 0, "pad_token_id": 0}
    layers = {"num_layers": 2, "num_decoder_layers": 2, "num_sparse_encoder_layers": 1}
    return build_model("SwitchTransformers", "ForConditionalGeneration", **sizes, **more, **layers)


def whisper():
    """Of whose encoder layers half are dropped in training."""
    sizes = {"vocab_size": 97, "d_model": 32, "num_mel_bins": 8, "max_source_positions": 20}
    for side in ("encoder", "decoder"):
        sizes |= {f"{side}_layers": 4, f"{side}_attention_heads": 4, f"{side}_ffn_dim": 48}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3}
    drop = {"encoder_layerdrop": 0.5, "decoder_layerdrop": 0.5, "max_target_positions": 32}
    return build_model("Whisper", "ForConditionalGeneration", **sizes, **ids, **drop)


IDS = {"input_ids": tokens(1, 3), "labels": tokens(1, 3)}
SPEECH = {"input_features": torch.randn(1, 8, 40), "decoder_input_ids": tokens(1, 3)}
# name: model, inputs, the ends of layers that are warned of
REAL = {
    "Llama": (llama, IDS, set()),
    "experts without tokens": (switch, IDS, set()),
    "layers that are dropped": (whisper, SPEECH, set()),
    "WavLM, of which all that is read is skipped": (lambda: wavlm(layerdrop=0.9), AUDIO, set()),
    "Mamba": (mamba, IDS, set()),
    "FalconMamba": (lambda: mamba("FalconMamba"), IDS, {"dt_proj"}),
    "Jamba": (jamba, IDS, {"dt_proj"}),
}


@pytest.mark.parametrize("name", REAL)
def test_real_models_warn_of_bypassed_layers_only(name):
    build, inputs, wanted = REAL[name]
    model = model_with_adapters(build().train())
    seen = set()
    for n, layer in find_lora_layers(model):
        layer.register_forward_pre_hook(lambda *_, n=n: seen.add(n))
    torch.manual_seed(0)
    assert len(warnings_of_bypass(model, **inputs)) == bool(wanted)
    found = fastlora.report(model).bypassed
    assert {n.rpartition(".")[2] for n in found} == wanted
    left = {n for n, _ in find_lora_layers(model)} - seen
    assert bool(left) == (bool(wanted) or " " in name)
    # Where the source reads what it also calls, the other mode's forward is watched too.
    assert (count_watch_hooks(model) > 0) == ("mba" in name)


class Keeping(nn.Module):
    """Calls a layer that it has kept aside, whatever takes the layer's place."""

    def __init__(self):
        super().__init__()
        self.inner, self.bound, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.aside, self.call = [self.inner], self.bound.forward
        self.words = nn.Embedding(4, 4)
        self.words.weight = self.head.weight  # of the model's own: tied

    def forward(self, x):
        return self.call(self.aside[0](x)) + self.words(x.long() % 4).sum(1)


@pytest.mark.parametrize("kind", ["fastlora", "PEFT"])
def test_layer_kept_aside_is_warned_of(kind):
    peft = pytest.importorskip("peft")
    model = Keeping()
    if kind == "PEFT":
        targets = ["inner", "bound", "head"]
        theirs = peft.get_peft_model(model, peft.LoraConfig(target_modules=targets))
        fastlora.patch_peft(theirs)
    else:
        model_with_adapters(model)
    (text,) = warnings_of_bypass(model, X.abs())
    # What reads the tied weight does nothing wrong, and a head may be unused.
    assert set(fastlora.report(model).bypassed) == {"inner", "bound"}
    assert ("not in the model" in text) == (kind == "fastlora")


class Fast(nn.Module):
    """Reads its layer in eval mode alone."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        return self.inner(x) if self.training else x @ self.inner.weight.T + self.inner.bias


def test_watch_lasts_until_each_mode_has_run():
    model = model_with_adapters(nn.Sequential(Fast(), nn.ReLU()))
    assert warnings_of_bypass(model.train(), X) == []
    assert warnings_of_bypass(model, X) == []
    assert len(warnings_of_bypass(model.eval(), X)) == 1
    assert count_watch_hooks(model) == 0


def test_watch_survives_parts_copies_threads_and_errors():
    model = model_with_adapters(nn.Sequential(Handing(), nn.ReLU()))
    twin, other = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        (text,) = warnings_of_bypass(model[0], X)  # a part that is called alone
        assert "by the model" in text
    assert len(warnings_of_bypass(model, X)) == 1
    assert len(warnings_of_bypass(twin, X)) == 1

    def failing():
        with pytest.raises(RuntimeError, match="size of tensor a"):
            other(torch.randn(2, 5))

    assert warnings_of_bypass(failing) == []

    def interrupted(*_):
        raise KeyboardInterrupt

    handle = other[1].register_forward_pre_hook(interrupted)
    with pytest.raises(KeyboardInterrupt):
        other(X)
    handle.remove()
    found = []
    thread = threading.Thread(target=lambda: found.extend(warnings_of_bypass(other, X)))
    thread.start()
    thread.join()
    assert len(found) == 1
    assert torch.add(X, X).shape == X.shape
    with torch.inference_mode():
        assert warnings_of_bypass(model_with_adapters(Handing(read=False)), X) == []
    assert torch._C._len_torch_function_stack() == 0


def test_first_forwards_of_two_threads_both_warn():
    """One ends within the other, and leaves it what ends it."""
    model, inner = model_with_adapters(nn.Sequential(Handing(), nn.Identity())), []
    entered, go = threading.Event(), threading.Event()

    def wait(*_):
        if threading.current_thread() is not threading.main_thread():
            entered.set()
            go.wait(60)

    model[1].register_forward_hook(wait)

    def first():
        model(X)
        inner.append(torch._C._len_torch_function_stack())

    # Warnings are caught for the whole process.
    thread = threading.Thread(target=first)
    with warnings.catch_warnings(record=True) as others:
        warnings.simplefilter("always")
        thread.start()
        assert entered.wait(60)
        model(X)
        assert count_watch_hooks(model) > 0
        go.set()
        thread.join()
    assert len([w for w in others if "were never called" in str(w.message)]) == 2
    assert (inner, count_watch_hooks(model)) == ([0], 0)


def test_watch_ends_under_checkpointing_generation_and_transforms():
    model = model_with_adapters(llama()).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert warnings_of_bypass(lambda: model(**IDS).loss.backward()) == []
    assert count_watch_hooks(model) == 0
    model = model_with_adapters(llama())
    assert warnings_of_bypass(model.generate, tokens(1, 3), max_new_tokens=2) == []
    assert count_watch_hooks(model) == 0
    model = model_with_adapters()
    arguments = (model, dict(model.named_parameters()), (X,))
    assert len(warnings_of_bypass(torch.func.functional_call, *arguments)) == 1
    assert len(warnings_of_bypass(torch.func.vmap(model_with_adapters()), X)) == 1


def test_compiled_model_is_watched_once_run_eagerly():
    torch.compiler.reset()
    model = model_with_adapters()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert warnings_of_bypass(compiled, X) == []
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert len(warnings_of_bypass(model, X)) == 1
        assert warnings_of_bypass(compiled, X) == []
    # A part that is compiled is called all the same.
    model = model_with_adapters()
    model.called = torch.compile(model.called, backend="eager", fullgraph=True)
    assert len(warnings_of_bypass(model, X)) == 1
    torch.compiler.reset()


def test_merging_bypassed_layer_is_refused():
    model = model_with_adapters()
    warnings_of_bypass(model, X)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for merge in (fastlora.merge_adapter, fastlora.merge_and_unload):
        with pytest.raises(RuntimeError, match="inner: Handing reads its weight, so its adapter"):
            merge(model)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    model.inner.lora_B.data.zero_()  # which adds nothing
    fastlora.unmerge_adapter(fastlora.merge_adapter(model))
    model = model_with_adapters(Handing(read=False))
    fastlora.merge_and_unload(model)
    assert count_watch_hooks(model) == 0
    # One that was put there by hand.
    model = wavlm()
    attention = model.wavlm.encoder.layers[0].attention
    attention.q_proj = randomise_lora(fastlora.FastLoRALinear.from_linear(attention.q_proj, r=2))
    with pytest.raises(RuntimeError, match=r"q_proj: WavLMAttention.* reads its weight and never"):
        fastlora.merge_adapter(model)


def test_servers_and_several_adapters_warn_too():
    server = fastlora.MultiLoRAModel(Handing(), max_adapters=1, max_rank=2)
    (text,) = warnings_of_bypass(server, X, adapter_names=[None, None])
    assert "read: inner (by the model, a Handing)" in text
    model = model_with_adapters(adapter_names=["a", "b"])
    with fastlora.use_adapters(model, ["a", "b"]):
        assert len(warnings_of_bypass(model, X)) == 1
