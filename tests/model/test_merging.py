"""merge_adapter and unmerge_adapter change every layer exactly, or none."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

import fastlora
from fastlora import FastLoRALinear, LoRAConfig
from fastlora.modules.layer import find_lora_layers
from tests.support.helpers import Interrupt, same_bits
from tests.support.models import (
    TOLERANCE,
    assert_agree,
    bert,
    error,
    llama,
    logits,
    randomise_lora,
    tokens,
    untouched,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAST = "model.layers.1.mlp.down_proj"


def adapted_model(dtype: torch.dtype = torch.float32, targets: object = "all-linear", **options):
    config = LoRAConfig(r=4, target_modules=targets, **options)
    return randomise_lora(fastlora.replace_linear(llama(dtype=dtype), config))


def copy_parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def changed_names(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {n for n, p in model.named_parameters() if not same_bits(p.detach(), before[n])}


@pytest.mark.parametrize("dtype", DTYPES)
def test_unmerge_adapter_restores_every_bit(dtype):
    model, x = adapted_model(dtype), tokens(2, 6)
    before, want = copy_parameters(model), logits(model, x)
    pointers = {name: p.data_ptr() for name, p in model.named_parameters()}
    for _ in range(2):
        assert fastlora.merge_adapter(model) is model
        assert changed_names(model, before) == {
            f"{name}.weight" for name, _ in find_lora_layers(model)
        }
        with fastlora.disable_adapter(model):
            base = logits(model, x)
        assert_agree(logits(model, x), want, base)
        assert fastlora.unmerge_adapter(model) is model
        assert changed_names(model, before) == set()
        assert same_bits(logits(model, x), want)
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == pointers


@pytest.mark.parametrize("act", [fastlora.merge_adapter, fastlora.merge_and_unload])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e38])
def test_merge_changes_nothing_when_one_layer_fails(act, value):
    model = adapted_model()
    dict(find_lora_layers(model))[LAST].lora_B.data[3, 1] = value
    model.get_submodule(LAST).lora_A.data[1] *= 1e3
    with untouched(model), pytest.raises(ValueError, match=f"{LAST}: .*not finite"):
        act(model)
    assert fastlora.report(model).merged == ()


@pytest.mark.parametrize("kind", [RuntimeError, MemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("step", [fastlora.merge_adapter, fastlora.unmerge_adapter])
@pytest.mark.parametrize("layer", [0, 5, 13])
def test_interrupted_merge_changes_no_layer(step, kind, layer):
    """While the first layer is written, one in the middle, and the last of fourteen."""
    with fastlora.use_backend("torch"):
        model = adapted_model()
        if step is fastlora.unmerge_adapter:
            fastlora.merge_adapter(model)
        merged = fastlora.report(model).merged
        weight = list(dict(find_lora_layers(model)).values())[layer].weight
        with (
            untouched(model),
            pytest.raises(kind, match="stop"),
            Interrupt("copy_", 1, weight, kind("stop")),
        ):
            step(model)
        assert fastlora.report(model).merged == merged


@pytest.mark.parametrize("layer", [0, 5, 13])
def test_merge_interrupted_after_writing_changes_no_layer(layer, monkeypatch):
    """After the weights were written, while what became of them is noted."""
    model, calls = adapted_model(), []

    def measured(*_):
        calls.append(1)
        if len(calls) == layer + 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(FastLoRALinear, "measure", measured)
    with untouched(model), pytest.raises(KeyboardInterrupt):
        fastlora.merge_adapter(model)
    assert fastlora.report(model).merged == ()


def test_refused_unmerge_leaves_all_layers_merged():
    """Also where the adapter has changed since, so that merging it anew would be another weight."""
    model = fastlora.merge_adapter(adapted_model())
    layers = dict(find_lora_layers(model))
    next(iter(layers.values())).lora_A.data.mul_(3)
    layers[LAST].weight.data.add_(1)
    with untouched(model), pytest.raises(RuntimeError, match=f"{LAST}: "):
        fastlora.unmerge_adapter(model)
    assert len(fastlora.report(model).merged) == len(layers)


def test_merging_twice_or_unmerging_unmerged_is_refused():
    model = adapted_model()
    for action in (fastlora.unmerge_adapter, lambda m: m.get_submodule(LAST).unmerge()):
        with untouched(model), pytest.raises(RuntimeError, match="not merged"):
            action(model)
    model.get_submodule(LAST).merge()
    for action in (fastlora.merge_adapter, fastlora.unmerge_adapter):
        with untouched(model), pytest.raises(RuntimeError, match="nothing was changed"):
            action(model)
    for action in (fastlora.merge_adapter, fastlora.unmerge_adapter, fastlora.merge_and_unload):
        with pytest.raises(RuntimeError, match="found none"):
            action(llama())


@pytest.mark.parametrize("act", [fastlora.merge_adapter, fastlora.merge_and_unload])
def test_merge_refuses_tied_weights(act):
    """Merging lm_head would change the embedding that shares its weight."""
    model = llama(tie_word_embeddings=True)
    fastlora.replace_linear(model, LoRAConfig(target_modules=["q_proj", "lm_head"]))
    randomise_lora(model)
    with untouched(model), pytest.raises(RuntimeError, match=r"lm_head: .*embed_tokens"):
        act(model)
    sliced = nn.Sequential(nn.Linear(8, 4), nn.Linear(8, 4))
    sliced[1].weight = nn.Parameter(sliced[0].weight.detach()[:4])
    fastlora.replace_linear(sliced, LoRAConfig(target_modules=["0"]))
    with untouched(sliced), pytest.raises(RuntimeError, match="tied"):
        act(sliced)


def test_module_with_two_names_is_merged_once():
    model = nn.ModuleDict({"a": nn.Sequential(nn.Linear(6, 6))})
    model["b"] = model["a"]
    fastlora.replace_linear(model, LoRAConfig(target_modules=["a.0"]))
    before, x = randomise_lora(model)["a"][0].weight.detach().clone(), torch.randn(3, 6)
    want = model["a"](x).detach()
    fastlora.unmerge_adapter(fastlora.merge_adapter(model))
    assert same_bits(model["a"][0].weight.detach(), before)
    fastlora.merge_and_unload(model)
    assert type(model["b"][0]) is nn.Linear
    assert model["b"] is model["a"]
    assert error(model["b"](x), want) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("before", ["plain", "merged", "half merged"])
def test_merge_and_unload_gives_plain_model(dtype, before):
    model, x = adapted_model(dtype), tokens(2, 6)
    want = logits(model, x)
    if before == "merged":
        fastlora.merge_adapter(model)
    elif before == "half merged":
        model.get_submodule(LAST).merge()
    calls = []
    model.get_submodule(LAST).register_forward_hook(lambda *_: calls.append(1))
    receipt = weakref.ref(model.get_submodule(LAST)._receipt) if before != "plain" else None
    assert fastlora.merge_and_unload(model) is model
    base = llama(dtype=dtype)
    assert_agree(logits(model, x), want, logits(base, x))
    assert list(model.state_dict()) == list(base.state_dict())
    plain = {name: vars(m).keys() for name, m in base.named_modules()}
    assert {name: vars(m).keys() for name, m in model.named_modules()} == plain
    assert {type(m) for m in model.modules()} == {type(m) for m in base.modules()}
    assert calls == [1]
    gc.collect()
    assert receipt is None or receipt() is None
    base.load_state_dict(model.state_dict())
    assert same_bits(logits(base, x), logits(model, x))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_merge_adapter_includes_lora_bias(dtype, bias):
    """Also where the base has none, which PEFT cannot merge."""
    model = nn.Sequential(nn.Linear(8, 6, bias=bias, dtype=dtype))
    x = torch.randn(3, 8, dtype=dtype)
    base = model(x).detach()
    fastlora.replace_linear(model, LoRAConfig(target_modules=["0"], lora_bias=True))
    randomise_lora(model).eval()
    before, want = copy_parameters(model), model(x).detach()
    fastlora.merge_adapter(model)
    assert_agree(model(x), want, base)
    fastlora.unmerge_adapter(model)
    assert changed_names(model, before) == set()
    fastlora.merge_and_unload(model)
    assert type(model[0]) is nn.Linear
    assert list(model.state_dict()) == ["0.weight", "0.bias"]
    assert not any(p.requires_grad for p in model.parameters())
    assert_agree(model(x), want, base)


@pytest.mark.parametrize("merged", [False, True])
def test_disable_adapter_gives_numbers_of_the_base(merged):
    x = tokens(2, 6)
    base, model = logits(llama(), x), adapted_model()
    if merged:
        fastlora.merge_adapter(model)
    before, want = copy_parameters(model), logits(model, x)
    assert error(base, want) > 0.1
    with fastlora.disable_adapter(model) as disabled:
        assert disabled is model
        assert same_bits(logits(model, x), base)
        with fastlora.disable_adapter(model):
            assert same_bits(logits(model, x), base)
        assert same_bits(logits(model, x), base)
        with untouched(model), pytest.raises(RuntimeError, match="disabled"):
            fastlora.merge_adapter(model)
    assert changed_names(model, before) == set()
    assert bool(fastlora.report(model).merged) == merged
    assert same_bits(logits(model, x), want)


@pytest.mark.parametrize("merged", [False, True])
def test_disable_adapter_restores_after_an_error(merged):
    model, x = adapted_model(), tokens(2, 6)
    if merged:
        fastlora.merge_adapter(model)
    want = logits(model, x)
    with untouched(model), pytest.raises(ZeroDivisionError), fastlora.disable_adapter(model):
        1 / 0  # noqa: B018
    assert same_bits(logits(model, x), want)
    if merged:
        fastlora.unmerge_adapter(model)
    with pytest.raises(RuntimeError, match="found none"), fastlora.disable_adapter(llama()):
        pass


def test_disabled_adapter_gets_no_gradient():
    model = adapted_model().train()
    with fastlora.disable_adapter(model):
        assert not model(input_ids=tokens(1, 4)).logits.requires_grad
    model(input_ids=tokens(1, 4)).logits.sum().backward()
    assert all(layer.lora_B.grad is not None for _, layer in find_lora_layers(model))


def test_merged_model_refuses_training_but_runs():
    model, x = fastlora.merge_adapter(adapted_model()).train(), tokens(1, 4)
    with untouched(model), pytest.raises(RuntimeError, match="eval"):
        model(input_ids=x)
    assert logits(model, x).shape == (1, 4, 97)  # without gradients
    assert model.eval()(input_ids=x).logits.shape == (1, 4, 97)


def test_bert_merges_unmerges_and_unloads():
    config = LoRAConfig(target_modules="all-linear", lora_bias=True, use_rslora=True)
    model, x = randomise_lora(fastlora.replace_linear(bert(), config)), tokens(2, 6)
    before, want = copy_parameters(model), logits(model, x)
    assert_agree(logits(fastlora.merge_adapter(model), x), want, logits(bert(), x))
    assert changed_names(fastlora.unmerge_adapter(model), before) == set()
    assert_agree(logits(fastlora.merge_and_unload(model), x), want)
