"""init_lora_weights: how adapters start and what that leaves of the base, as in PEFT."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from peft.tuners.lora.layer import Linear as PeftLinear
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import fastlora
from fastlora import FastLoRAConv1D, FastLoRALinear, LoRAConfig
from fastlora.modules.layer import find_lora_layers
from tests.support.helpers import Interrupt, same_bits
from tests.support.models import (
    TOLERANCE,
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

SPLITTING = ["pissa", "olora", "pissa_niter_4"]
pytestmark = quiet


def linear(dtype: torch.dtype = torch.float32, N: int = 20, K: int = 14) -> nn.Linear:
    return nn.Linear(K, N).to(dtype)


def conv1d(dtype: torch.dtype = torch.float32) -> nn.Module:
    conv = Conv1D(20, 14).to(dtype)
    nn.init.normal_(conv.weight)
    return conv


def peft_layer(base: nn.Module, how: str, **options) -> PeftLinear:
    flat = isinstance(base, nn.Linear)
    config = peft.LoraConfig(init_lora_weights=how, fan_in_fan_out=not flat, **options)
    alpha = options.get("lora_alpha", 8)
    return PeftLinear(copy.deepcopy(base), "default", config, r=options["r"], lora_alpha=alpha)


def fastlora_layer(base: nn.Module, how: str, **options):
    if isinstance(base, nn.Linear):
        return FastLoRALinear.from_linear(base, init_lora_weights=how, **options)
    return FastLoRAConv1D.from_conv1d(base, init_lora_weights=how, **options)


def factors(layer) -> list[Tensor]:
    if isinstance(layer, PeftLinear):
        return [getattr(layer, f"lora_{part}")["default"].weight for part in "AB"]
    return [layer.lora_A, layer.lora_B]


@pytest.mark.parametrize(
    "options",
    [{"r": 4}, {"r": 5, "lora_alpha": 3}, {"r": 14, "lora_alpha": 20, "use_rslora": True}],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("how, build", [("pissa", linear), ("olora", linear), ("pissa", conv1d)])
def test_splitting_init_gives_residual_and_factors_of_peft(how, build, dtype, options):
    base, x = build(dtype), torch.randn(7, 14, dtype=dtype)
    want, weight = base(x), base.weight.detach().clone()
    theirs = peft_layer(base, how, **options)
    at = base.weight.data_ptr()
    ours = fastlora_layer(base, how, **options)
    assert ours.weight.data_ptr() == at
    assert same_bits(ours.weight, theirs.base_layer.weight)
    assert error(ours.weight, weight) > 0.1
    # PEFT's went through the base's dtype.
    for mine, other in zip(factors(ours), factors(theirs), strict=True):
        assert error(mine, other) <= torch.finfo(dtype).eps
        assert mine.dtype == torch.float32
    assert error(ours(x), want) <= TOLERANCE[dtype]


@pytest.mark.parametrize("how", ["pissa_niter_4", "pissa_niter_0", "orthogonal"])
@pytest.mark.parametrize("build", [linear, conv1d])
def test_random_init_draws_same_numbers_as_peft(how, build):
    base = build()
    torch.manual_seed(3)
    theirs = peft_layer(base, how, r=4)
    torch.manual_seed(3)
    nn.Linear(14, 4, bias=False), nn.Linear(4, 20, bias=False)  # PEFT draws these first
    weight = base.weight.detach().clone()
    ours = fastlora_layer(base, how, r=4)
    for mine, other in zip(factors(ours), factors(theirs), strict=True):
        assert error(mine, other) <= 1e-5
    assert error(ours.weight, theirs.base_layer.weight) <= 1e-6
    assert same_bits(ours.weight, weight) == (how == "orthogonal")


def test_orthogonal_adapter_adds_nothing_at_first():
    ours = FastLoRALinear(64, 48, r=8, init_lora_weights="orthogonal")
    A, B = (t.detach() for t in factors(ours))
    assert float((B @ A).abs().max()) < 1e-6
    assert min(float(t.abs().max()) for t in (A, B)) > 0.1


@pytest.mark.parametrize("how", SPLITTING)
def test_split_model_computes_what_it_did(how):
    model, ids = llama(), tokens(2, 7)
    fastlora.replace_linear(
        model, LoRAConfig(r=4, target_modules="all-linear", init_lora_weights=how)
    )
    assert_agree(logits(model, ids), logits(llama(), ids))
    with fastlora.disable_adapter(model):
        assert error(logits(model, ids), logits(llama(), ids)) > 0.1


def trained_a_little(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    return model.eval()


CASES = [
    ("pissa", llama, {"target_modules": "all-linear", "lora_alpha": 3}),
    ("pissa", gpt2, {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    ("olora", llama, {"target_modules": ["q_proj", "up_proj"], "rank_pattern": {"up_proj": 7}}),
    ("orthogonal", llama, {"target_modules": ["q_proj"]}),
]


@pytest.mark.parametrize("how, build, options", CASES)
def test_split_adapters_load_in_both_libraries(tmp_path, how, build, options):
    """The file has no residual: who loads it splits the base again."""
    options, ids = options | {"r": 4, "init_lora_weights": how}, tokens(2, 9)
    theirs = trained_a_little(peft.get_peft_model(build(), peft.LoraConfig(**options)))
    theirs.save_pretrained(str(tmp_path / "peft"))
    ours = fastlora.load_adapter(build(), tmp_path / "peft")
    assert_agree(logits(ours, ids), logits(theirs, ids), logits(build(), ids))
    with fastlora.disable_adapter(ours), theirs.disable_adapter():
        assert_agree(logits(ours, ids), logits(theirs, ids))
    fastlora.save_adapter(
        trained_a_little(fastlora.replace_linear(build(), LoRAConfig(**options))), tmp_path
    )
    own = fastlora.load_adapter(build(), tmp_path)
    again = peft.PeftModel.from_pretrained(build(), str(tmp_path)).eval()
    assert_agree(logits(own, ids), logits(again, ids), logits(build(), ids))
    assert load_file(tmp_path / "adapter_model.safetensors").keys() == (
        load_file(tmp_path / "peft" / "adapter_model.safetensors").keys()
    )
    fastlora.merge_and_unload(own)
    assert_agree(logits(own, ids), logits(again.merge_and_unload(), ids))


@pytest.mark.filterwarnings("ignore:PiSSA changes the base weights")
def test_adapter_converted_by_peft_loads_onto_base(tmp_path):
    """Its path_initial_model_for_weight_conversion: twice the rank, on the base as it was."""
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights="pissa")
    theirs, ids = peft.get_peft_model(llama(), config), tokens(2, 7)
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(str(tmp_path / "initial"))
    theirs.peft_config["default"].init_lora_weights = "pissa"
    trained_a_little(theirs)
    theirs.save_pretrained(
        str(tmp_path / "out"), path_initial_model_for_weight_conversion=str(tmp_path / "initial")
    )
    ours = fastlora.load_adapter(llama(), tmp_path / "out")
    assert {layer.r for _, layer in find_lora_layers(ours)} == {8}
    assert_agree(logits(ours, ids), logits(theirs, ids), logits(llama(), ids))


def test_adapter_of_another_init_is_refused(tmp_path):
    settings = {"r": 4, "target_modules": ["q_proj"]}
    for how in (True, "gaussian", *SPLITTING):
        config = LoRAConfig(**settings, init_lora_weights=how)
        fastlora.save_adapter(
            trained_a_little(fastlora.replace_linear(llama(), config)), tmp_path / str(how)
        )
    for into in (True, "pissa", "olora"):
        for how in ("gaussian", *SPLITTING):
            model = fastlora.replace_linear(llama(), LoRAConfig(**settings, init_lora_weights=into))
            if how == into or (into is True and how == "gaussian"):
                fastlora.load_adapter(model, tmp_path / how)
                want = fastlora.load_adapter(llama(), tmp_path / how)
                assert_agree(logits(model, ids := tokens(2, 5)), logits(want, ids))
            else:
                with untouched(model), pytest.raises(ValueError, match="init_lora_weights: the ad"):
                    fastlora.load_adapter(model, tmp_path / how)
    scaled = LoRAConfig(**settings, init_lora_weights="olora", lora_alpha=2)
    model = fastlora.replace_linear(llama(), scaled)
    with untouched(model), pytest.raises(ValueError, match=r"at a scaling of 2.*leaves at 0\.5"):
        fastlora.load_adapter(model, tmp_path / "olora")


def nan(model: nn.Module) -> None:
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")


def wide(model: nn.Module) -> None:
    model.model.layers[1].mlp.up_proj.to(torch.float64)


def tie(model: nn.Module) -> None:
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight


def meta(model: nn.Module) -> None:
    model.model.layers[1].mlp.up_proj.to("meta")


UNFIT = {
    "values that are not finite": (nan, {}, "a weight of finite numbers"),
    "float64": (wide, {}, "float16, bfloat16 or float32, got torch.float64"),
    "a tied weight": (tie, {}, r"0\.mlp\.up_proj: .* tied with model\.layers\.1\.mlp\.up_proj"),
    "no values": (meta, {}, "a weight that has values, got meta"),
    "too high a rank": (lambda _: None, {"rank_pattern": {"1.mlp.up_proj": 33}}, "at most 32"),
    "no scaling": (lambda _: None, {"lora_alpha": 0}, "not finite"),
    "a negative scaling": (lambda _: None, {"lora_alpha": -2}, "not finite"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_replace_linear_splits_all_weights_or_none(name):
    change, options, says = UNFIT[name]
    model = llama()
    change(model)
    config = LoRAConfig(r=4, target_modules="all-linear", init_lora_weights="pissa", **options)
    with (
        untouched(model),
        pytest.raises((TypeError, ValueError), match=rf"^model\.layers.*{says}"),
    ):
        fastlora.replace_linear(model, config)


@pytest.mark.parametrize("count", [1, 20, 40])
def test_interrupted_split_leaves_model_unchanged(count):
    model = llama()
    config = LoRAConfig(r=4, target_modules="all-linear", init_lora_weights="olora")
    with untouched(model), pytest.raises(KeyboardInterrupt), Interrupt("copy_", count):
        fastlora.replace_linear(model, config)


def test_splitting_tied_weight_is_refused():
    model = llama(tie_word_embeddings=True)
    config = LoRAConfig(target_modules=["lm_head"], init_lora_weights="olora")
    with untouched(model), pytest.raises(ValueError, match=r"lm_head: .*embed_tokens\.weight"):
        fastlora.replace_linear(model, config)


def test_olora_of_conv1d_is_refused():
    base = conv1d()
    with untouched(base), pytest.raises(ValueError, match="'olora' is not for Conv1D"):
        fastlora_layer(base, "olora", r=4)
    theirs = peft_layer(base, "olora", r=4)
    with pytest.raises(RuntimeError, match="shape"):
        theirs(torch.randn(3, 14))


@pytest.mark.parametrize("how", SPLITTING)
def test_layer_cannot_be_split_twice(how):
    ours = fastlora_layer(linear(), how, r=4)
    with untouched(ours), pytest.raises(RuntimeError, match=f"'{how}' has split"):
        ours.reset_lora_parameters()
    with pytest.raises(ValueError, match=f"init_lora_weights: '{how}' splits"):
        FastLoRALinear(14, 20, init_lora_weights=how)


@pytest.mark.parametrize("how", SPLITTING)
def test_split_layer_refuses_state_of_plain_base(how):
    ours, other = (nn.Sequential(fastlora_layer(linear(), how, r=4)) for _ in range(2))
    with untouched(ours), pytest.raises(RuntimeError, match=r"0\.weight: .*would count twice"):
        ours.load_state_dict(nn.Sequential(linear()).state_dict())
    ours.load_state_dict(other.state_dict())
    x = torch.randn(3, 14)
    assert same_bits(ours(x), other(x))


@pytest.mark.parametrize("how", SPLITTING)
def test_split_adapter_is_refused_where_base_is_shared(tmp_path, how):
    config = LoRAConfig(r=4, target_modules=["q_proj"], init_lora_weights=how)
    fastlora.save_adapter(randomise_lora(fastlora.replace_linear(llama(), config)), tmp_path)
    llama().save_pretrained(tmp_path / "base")
    model = llama()
    for call in (
        lambda: fastlora.MultiLoRAModel(llama()).load_adapter(tmp_path, "a"),
        lambda: fastlora.replace_linear(model, config, adapter_names=["a", "b"]),
        lambda: fastlora.combine_adapters([tmp_path, tmp_path], [1, 1], tmp_path / "out"),
        lambda: fastlora.merge_checkpoint(tmp_path / "base", [tmp_path], tmp_path / "merged"),
    ):
        with untouched(model), pytest.raises(ValueError, match=f"init_lora_weights='{how}'"):
            call()
