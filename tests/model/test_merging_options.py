"""merge_adapter with untied weights, snapshots, swaps and fidelity reports, and when steps fail."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import fastlora
from fastlora import LoRAConfig
from fastlora.functional.fidelity import FidelityWarning
from fastlora.modules.layer import find_lora_layers
from fastlora.modules.linear import FastLoRALinear
from tests.support.helpers import Interrupt, Wrapped, same_bits
from tests.support.models import assert_agree, llama, logits, randomise_lora, tokens, untouched

LAST = "model.layers.1.mlp.down_proj"


def adapted_model(dtype: torch.dtype = torch.float32, **options) -> nn.Module:
    return randomise_lora(
        fastlora.replace_linear(llama(dtype=dtype), LoRAConfig(r=4, target_modules="all-linear")),
        **options,
    )


def copy_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: layer.weight.detach().clone() for name, layer in find_lora_layers(model)}


def tied_model() -> nn.Module:
    model = llama(tie_word_embeddings=True)
    fastlora.replace_linear(model, LoRAConfig(target_modules=["q_proj", "lm_head"]))
    return randomise_lora(model)


def test_untie_merges_head_and_keeps_embedding():
    model, x = tied_model(), tokens(2, 6)
    want, embedding = logits(model, x), model.model.embed_tokens.weight
    before = embedding.detach().clone()
    fastlora.merge_adapter(model, untie=True)
    assert_agree(logits(model, x), want, logits(llama(tie_word_embeddings=True), x))
    assert same_bits(embedding.detach(), before)
    assert fastlora.report(model).untied == {"lm_head": ("model.embed_tokens.weight",)}
    assert "untied lm_head from model.embed_tokens.weight" in str(fastlora.report(model))
    fastlora.unmerge_adapter(model)
    assert same_bits(model.lm_head.weight.detach(), before)
    assert same_bits(logits(model, x), want)


@pytest.mark.parametrize("act", [fastlora.merge_adapter, fastlora.merge_and_unload])
def test_failed_merge_with_untie_ties_again(act):
    model = tied_model()
    model.lm_head.lora_B.data[3, 1] = float("nan")
    with untouched(model), pytest.raises(ValueError, match=r"lm_head: .*not finite"):
        act(model, untie=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert fastlora.report(model).untied == {}


def test_slices_of_one_tensor_merge_separately():
    """As a packed projection that was split: only what shares elements is refused."""
    packed = torch.randn(12, 8)
    model = nn.ModuleDict({name: nn.Linear(8, 4, bias=False) for name in "qkv"})
    for i, linear in enumerate(model.values()):
        linear.weight = nn.Parameter(packed[4 * i : 4 * i + 4], requires_grad=False)
    before = packed.clone()
    fastlora.replace_linear(model, LoRAConfig(target_modules=["q", "v"]))
    fastlora.merge_adapter(randomise_lora(model))
    assert same_bits(packed[4:8], before[4:8])
    assert not same_bits(packed, before)
    fastlora.unmerge_adapter(model)
    assert same_bits(packed, before)


def test_merge_with_snapshot_restores_every_bit():
    model, x = adapted_model(torch.bfloat16), tokens(2, 6)
    before, want = copy_weights(model), logits(model, x)
    fastlora.merge_adapter(model, snapshot=True)
    assert all(layer.receipt.snapshot is not None for _, layer in find_lora_layers(model))
    merged = copy_weights(model)
    with fastlora.disable_adapter(model):
        assert all(same_bits(w, before[name]) for name, w in copy_weights(model).items())
    assert all(same_bits(w, merged[name]) for name, w in copy_weights(model).items())
    assert all(layer.receipt.snapshot is not None for _, layer in find_lora_layers(model))
    fastlora.unmerge_adapter(model)
    assert all(same_bits(w, before[name]) for name, w in copy_weights(model).items())
    assert same_bits(logits(model, x), want)


def save_model_adapter(directory, model: nn.Module) -> nn.Module:
    fastlora.save_adapter(model, directory)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swap_adapter_equals_unmerge_load_and_merge(tmp_path, dtype):
    """The bits of unmerging, loading and merging; the layers hold the new one afterwards."""
    other, x = save_model_adapter(tmp_path, adapted_model(dtype, std=0.2)), tokens(2, 6)
    model = fastlora.merge_adapter(adapted_model(dtype))
    before, base = copy_weights(model), copy_weights(adapted_model(dtype))
    assert fastlora.swap_adapter(model, tmp_path) is model
    fastlora.merge_adapter(other)
    assert all(same_bits(w, copy_weights(model)[name]) for name, w in copy_weights(other).items())
    assert not any(same_bits(w, before[name]) for name, w in copy_weights(model).items())
    fastlora.unmerge_adapter(fastlora.unmerge_adapter(other) and model)
    assert all(same_bits(w, base[name]) for name, w in copy_weights(model).items())
    assert same_bits(logits(model, x), logits(other, x))


def test_failed_swap_leaves_old_adapter_merged(tmp_path, monkeypatch):
    other = adapted_model(std=0.2)
    save_model_adapter(tmp_path / "good", other)
    dict(find_lora_layers(other))[LAST].lora_B.data[0, 0] = 3e38
    dict(find_lora_layers(other))[LAST].lora_A.data[0] = 10
    save_model_adapter(tmp_path / "bad", other)
    model = adapted_model()
    with untouched(model), pytest.raises(RuntimeError, match="not merged"):
        fastlora.swap_adapter(model, tmp_path / "good")
    fastlora.merge_adapter(model)
    with untouched(model), pytest.raises(ValueError, match=rf"{LAST}: .*not finite"):
        fastlora.swap_adapter(model, tmp_path / "bad")
    last = list(dict(find_lora_layers(model)).values())[-1]
    for tensor in (last.weight, last.lora_B):
        with (
            fastlora.use_backend("torch"),
            untouched(fastlora.merge_adapter(fastlora.unmerge_adapter(model))),
            pytest.raises(KeyboardInterrupt),
            Interrupt("copy_", 1, tensor),
        ):
            fastlora.swap_adapter(model, tmp_path / "good")
    scalings = {layer.scaling for _, layer in find_lora_layers(model)}
    fastlora.unmerge_adapter(model)
    assert scalings == {layer.scaling for _, layer in find_lora_layers(adapted_model())}


def test_merge_warns_and_reports_lost_fidelity():
    """In bfloat16 a delta a thousandth of the weight's size loses half of itself."""
    model = adapted_model(torch.bfloat16)
    for _, layer in find_lora_layers(model):
        change = layer.scaling * layer.lora_B.detach() @ layer.lora_A.detach()
        layer.lora_B.data *= 1e-3 * layer.weight.detach().float().norm() / change.norm()
    assert fastlora.report(model).fidelity == {}
    with pytest.warns(FidelityWarning, match=r"lost part of the adapter in 14 of 14 .* has \d\d%"):
        fastlora.merge_adapter(model)
    found = fastlora.report(model).fidelity
    assert found.keys() == dict(find_lora_layers(model)).keys()
    assert all(0.3 < each.gain < 0.7 and each.error > 0.5 for each in found.values())
    assert "least of its adapter arrived in" in str(fastlora.report(model))
    fastlora.unmerge_adapter(model)
    assert fastlora.report(model).fidelity == {}


def test_merge_does_not_warn_when_nothing_is_lost():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = fastlora.merge_adapter(adapted_model())
    assert all(each.gain > 0.999 for each in fastlora.report(model).fidelity.values())


class DTensor(torch.Tensor):
    """As torch.distributed's, whose values lie on several processes."""

    placements = ()


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda w: nn.Parameter(w.as_subclass(DTensor), requires_grad=False), "is sharded over"),
        (
            lambda w: nn.Parameter(Wrapped(w), requires_grad=False),
            "got a tests.support.helpers.Wrapped, which holds its numbers",
        ),
        (
            lambda w: nn.Parameter(w.to(torch.float8_e4m3fn), requires_grad=False),
            "float8_e4m3fn, which is quantized",
        ),
        (lambda w: nn.Parameter(w.to(torch.int8), requires_grad=False), "int8, which is quantized"),
    ],
    ids=["sharded", "subclass", "float8", "int8"],
)
def test_merge_refuses_sharded_and_quantized_weights_by_name(make, message):
    layers = [FastLoRALinear(8, 6, r=2), FastLoRALinear(6, 4, r=2)]
    model = randomise_lora(nn.Sequential(*layers))
    model[1]._parameters["weight"] = make(model[1].weight.detach())
    before = model[0].weight.detach().clone()
    with pytest.raises(TypeError, match=rf"^1: weight: .*{message}"):
        fastlora.merge_adapter(model)
    assert same_bits(model[0].weight.detach(), before)
    assert fastlora.report(model).merged == ()


def test_untie_updates_tie_word_embeddings_of_config():
    """Or tie_weights, and whoever reads the saved config, would lose the merged layer."""
    model, x = tied_model(), tokens(2, 6)
    want = logits(model, x)
    fastlora.merge_and_unload(model, untie=True)
    assert model.config.tie_word_embeddings is False
    model.tie_weights()
    assert_agree(logits(model, x), want)
    failing = tied_model()
    failing.lm_head.lora_B.data[3, 1] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        fastlora.merge_adapter(failing, untie=True)
    assert failing.config.tie_word_embeddings is True


def test_merge_refuses_weight_shared_with_a_buffer():
    layer = FastLoRALinear(8, 6, r=2)
    model = randomise_lora(nn.Sequential(layer, nn.Identity()))
    model[1].register_buffer("table", layer.weight.detach())
    with (
        untouched(model),
        pytest.raises(RuntimeError, match=r"^0: its weight is tied with 1\.table"),
    ):
        fastlora.merge_adapter(model)


def test_merge_is_undone_when_warning_raises():
    model = adapted_model(torch.bfloat16)
    for _, layer in find_lora_layers(model):
        layer.lora_B.data *= 1e-4
    for act in (fastlora.merge_adapter, fastlora.merge_and_unload):
        with warnings.catch_warnings(), untouched(model):
            warnings.simplefilter("error")
            with pytest.raises(FidelityWarning):
                act(model)
        assert fastlora.report(model).merged == ()
    with pytest.warns(FidelityWarning) as caught:
        fastlora.merge_adapter(model)
    assert caught[0].filename == __file__


@pytest.mark.parametrize("name", ["measure", "to_linear"])
def test_merge_is_undone_when_later_step_fails(monkeypatch, name):
    model, calls = adapted_model(), []
    original = getattr(FastLoRALinear, name)

    def failing(self, *args):
        calls.append(1)
        if len(calls) == 9:
            raise MemoryError
        return original(self, *args)

    monkeypatch.setattr(FastLoRALinear, name, failing)
    with untouched(model), pytest.raises(MemoryError):
        fastlora.merge_and_unload(model)
    assert len(dict(find_lora_layers(model))) == 14
    layer = dict(find_lora_layers(model))[LAST]
    calls[:] = [1] * 8
    if name == "measure":
        with untouched(model), pytest.raises(MemoryError):
            layer.merge()
        assert not layer.merged


def test_merge_and_unload_refuses_an_edited_weight():
    model = fastlora.merge_adapter(adapted_model())
    dict(find_lora_layers(model))[LAST].weight.data.zero_()
    with untouched(model), pytest.raises(RuntimeError, match=f"{LAST}: weight: it is not the one"):
        fastlora.merge_and_unload(model)


@pytest.mark.parametrize("snapshot", [False, True])
def test_disable_adapter_restores_merged_bits(snapshot):
    """With the bits of then, whatever became of the adapter and of the backend asked for."""
    model = adapted_model(torch.bfloat16)
    with fastlora.use_backend("torch"):
        fastlora.merge_adapter(model, snapshot=snapshot)
    before = copy_weights(model)
    with fastlora.disable_adapter(model):
        for _, layer in find_lora_layers(model):
            layer.lora_B.data.mul_(3)
    if not snapshot:
        assert all(same_bits(w, before[name]) for name, w in copy_weights(model).items())
    fastlora.unmerge_adapter(model)
    base = copy_weights(adapted_model(torch.bfloat16))
    assert all(same_bits(w, base[name]) for name, w in copy_weights(model).items())


def test_fidelity_detects_loss_in_wide_and_tall_layers():
    """Rows and columns of which only a few have lost their adapter do not hide the others."""
    for N, K in ((64, 9000), (9000, 64)):
        layer = FastLoRALinear(K, N, r=2, bias=False, dtype=torch.bfloat16)
        randomise_lora(layer, std=1e-5)
        layer.lora_B.data[0] = 3
        layer.merge()
        assert layer.fidelity.gain > 0.9
        layer.unmerge()
        layer.lora_B.data[0] = 0
        layer.merge()
        assert layer.fidelity.gain < 0.5


def test_interrupted_remerge_leaves_model_merged():
    """At the end of disable_adapter, and while a merged model is looked at for good."""
    with fastlora.use_backend("torch"):
        model = fastlora.merge_adapter(adapted_model())
        weight = list(dict(find_lora_layers(model)).values())[5].weight
        before = copy_weights(model)
        mode = Interrupt("copy_", 1, weight)

        def disabled():
            with fastlora.disable_adapter(model):
                mode.__enter__()

        with pytest.raises(KeyboardInterrupt):
            disabled()
        mode.__exit__(None, None, None)
    assert all(layer.merged for _, layer in find_lora_layers(model))
    assert all(same_bits(w, before[name]) for name, w in copy_weights(model).items())
