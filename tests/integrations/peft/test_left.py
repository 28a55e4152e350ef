"""patch_peft leaves bases quantized by other libraries and fused experts to PEFT, by name.

`make test-bases` installs the libraries, which the lock leaves out: they are large, or old.
"""

from __future__ import annotations

import copy
import importlib
import re
import warnings

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

import fastlora  # noqa: E402
from tests.support.helpers import Wrapped  # noqa: E402
from tests.support.models import assert_agree, quiet  # noqa: E402
from tests.support.patched import fill_adapters, peft_model  # noqa: E402

pytestmark = quiet
OTHERS = "it is a peft.tuners.lora.{}, not a peft.tuners.lora.Linear".format


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.odd, self.plain = nn.Linear(64, 64), nn.Linear(64, 32)

    def forward(self, x):
        return self.plain(self.odd(x).relu())


def import_or_skip(name: str):
    return pytest.importorskip(name, reason=f"{name} is not in the lock: see `make test-bases`")


def torchao(config: str):
    def quantize(linear):
        ao = import_or_skip("torchao.quantization")
        ao.quantize_(linear, getattr(ao, config)())
        return linear

    return quantize


def hqq(linear):
    core = import_or_skip("hqq.core.quantize")
    config = core.BaseQuantizeConfig(nbits=4, group_size=64)
    return core.HQQLinear(linear, config, compute_dtype=torch.float32, device="cpu")


def quanto(linear):
    library = import_or_skip("optimum.quanto")
    whole = nn.Sequential(linear)
    library.quantize(whole, weights=library.qint8)
    library.freeze(whole)
    return whole[0]


def gguf(linear):
    """As diffusers has it: transformers turns a GGUF file into plain weights."""
    numbers, library = import_or_skip("gguf"), import_or_skip("diffusers.quantizers.gguf.utils")
    kind = numbers.GGMLQuantizationType.Q8_0
    made = library.GGUFLinear(64, 64, bias=True, compute_dtype=torch.float32)
    packed = torch.from_numpy(numbers.quants.quantize(linear.weight.detach().numpy(), kind))
    made.weight = library.GGUFParameter(packed, requires_grad=False, quant_type=kind)
    made.bias = linear.bias
    return made


BASES = {
    "torchao int8": (torchao("Int8WeightOnlyConfig"), OTHERS("torchao.TorchaoLoraLinear")),
    "torchao float8": (torchao("Float8WeightOnlyConfig"), OTHERS("torchao.TorchaoLoraLinear")),
    "hqq": (hqq, OTHERS("hqq.HqqLoraLinear")),
    "quanto": (quanto, "its base_layer has a weight of type WeightQBytesTensor"),
    "gguf": (gguf, "its base_layer has a weight of type GGUFParameter"),
}


def quantized_base(quantize):
    torch.manual_seed(1)
    made = Pair()
    made.odd = quantize(made.odd)
    return made


def act(model, x):
    """Output and gradients."""
    model.zero_grad()
    y = model(x)
    y.square().sum().backward()
    return [y.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def assert_left(plain, patched, x, reasons):
    """The layers in ``reasons`` are named and stay PEFT's, others run here; all as PEFT."""
    said = "; ".join(dict.fromkeys(reasons.values()))
    with pytest.raises(ValueError, match=f"{len(reasons)} of .* LoRA layers .*{re.escape(said)}"):
        fastlora.patch_peft(patched, strict=True)
    assert [type(m) for m in patched.modules()] == [type(m) for m in plain.modules()]
    found = fastlora.patch_peft(patched)
    assert found.skipped == reasons
    assert found.replaced
    assert fastlora.report(patched) == found
    for name in reasons:
        assert type(patched.get_submodule(name)) is type(plain.get_submodule(name))
    for got, want in zip(act(patched, x), act(plain, x), strict=True):
        assert_agree(got, want)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", BASES)
def test_patch_peft_leaves_other_quantized_bases(kind):
    quantize, reason = BASES[kind]
    settings = peft.LoraConfig(r=4, target_modules=["odd", "plain"])
    made = [quantized_base(quantize) for _ in range(3)]
    plain, patched = (fill_adapters(peft.get_peft_model(each, settings)) for each in made[:2])
    x = torch.randn(3, 64)
    assert_left(plain, patched, x, {"base_model.model.odd": reason})
    alone = peft.get_peft_model(
        quantized_base(quantize), peft.LoraConfig(r=4, target_modules=["odd"])
    )
    with pytest.raises(ValueError, match=f"1 of 1 LoRA layers .*{re.escape(reason)}"):
        fastlora.patch_peft(alone)
    # What replaces layers refuses these where it takes them.
    with pytest.raises(ValueError, match="target_modules: cannot replace odd: "):
        fastlora.replace_linear(made[2], fastlora.LoRAConfig(target_modules=["odd", "plain"]))
    with pytest.raises(TypeError, match="linear: "):
        fastlora.FastLoRALinear.from_linear(made[2].odd)


def bitnet(linear):
    kind = pytest.importorskip("transformers.integrations.bitnet").AutoBitLinear
    made = kind(64, 64, bias=True)
    made.load_state_dict(linear.state_dict(), strict=False)
    return made


def fake_quantized(linear):
    qat = import_or_skip("torchao.quantization.qat")
    config = qat.IntxFakeQuantizeConfig(torch.int4, group_size=32)
    library = importlib.import_module("torchao.quantization.qat.linear")
    return library.FakeQuantizedLinear.from_linear(linear, weight_config=config)


@pytest.mark.parametrize("quantize", [bitnet, fake_quantized])
def test_patch_peft_adds_onto_fake_quantized_bases(quantize):
    settings = peft.LoraConfig(r=4, target_modules=["odd", "plain"])
    plain, patched = (
        fill_adapters(peft.get_peft_model(quantized_base(quantize), settings)) for _ in range(2)
    )
    found = fastlora.patch_peft(patched, strict=True)
    assert list(found.around) == ["base_model.model.odd"]
    x = torch.randn(3, 64)
    with torch.compiler.set_stance("force_eager"):  # else it compiles parts, for seconds
        for got, want in zip(act(patched, x), act(plain, x), strict=True):
            assert_agree(got, want)


def test_patch_peft_leaves_fused_experts_to_peft():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 97}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}
    torch.manual_seed(1)
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, **heads))
    experts = ["experts.gate_up_proj", "experts.down_proj"]
    settings = peft.LoraConfig(r=4, target_modules=["q_proj"], target_parameters=experts)
    made = (peft.get_peft_model(copy.deepcopy(model), settings) for _ in range(2))
    plain, patched = (Logits(fill_adapters(each)) for each in made)
    name = "model.base_model.model.model.layers.0.mlp.experts"
    reason = OTHERS("layer.ParamWrapper")
    reasons = {name: reason, f"{name}.base_layer": reason}
    assert_left(plain, patched, torch.arange(1, 13).view(2, 6), reasons)
    for each in (plain, patched):
        each.model.merge_adapter()
    for got, want in zip(*(act_merged(each) for each in (plain, patched)), strict=True):
        assert_agree(got, want)


class Logits(nn.Module):
    def __init__(self, model) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(input_ids=ids).logits


@torch.no_grad()
def act_merged(model):
    merged = model(torch.arange(1, 13).view(2, 6))
    model.model.unmerge_adapter()
    return [merged, model(torch.arange(1, 13).view(2, 6))]


def test_merge_refuses_base_quantized_after_patching():
    """PEFT adds to ``weight.data``, of which such classes may give out a copy: then it is lost."""
    model = peft_model("mlp")
    fastlora.patch_peft(model, strict=True)
    layer = model.base_model.model.lin0
    weight = layer.base_layer.weight
    layer.base_layer.weight = nn.Parameter(Wrapped(weight.detach()), requires_grad=False)
    reason = "its base_layer has a weight of type Wrapped"
    assert fastlora.report(model).skipped == {"base_model.model.lin0": reason}
    before = weight.detach().clone()
    with pytest.raises(TypeError, match=r"adapter 'default': its base's weight is a .*Wrapped"):
        model.merge_adapter()
    assert not layer.merged
    assert torch.equal(weight, before)


class Quantos(Wrapped):
    """As optimum-quanto's tensors, in which what is assigned to ``data`` does not arrive."""

    __module__ = "optimum.quanto.tensor.weights"


@pytest.mark.parametrize("how", ["merge_adapter", "merge_and_unload", "unload"])
def test_merge_warns_when_adapter_would_be_lost(how):
    settings = peft.LoraConfig(r=4, target_modules=["odd", "plain"])
    model = fill_adapters(peft.get_peft_model(quantized_base(lambda linear: linear), settings))
    fastlora.patch_peft(model)
    for name in ("odd", "plain"):
        layer = model.base_model.model.get_submodule(name)
        # Not merged here, where only the warning is looked at.
        layer.merge = lambda *args, **kwargs: None
        layer.unload_and_optionally_merge_module = lambda *args, layer=layer, **kwargs: layer
    layer = model.base_model.model.odd.base_layer
    layer.weight = nn.Parameter(Quantos(layer.weight.detach()), requires_grad=False)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        getattr(model, how)()
    found = [str(each.message) for each in said if "optimum-quanto" in str(each.message)]
    assert len(found) == (how != "unload")
    assert all(": odd stay as they are" in text for text in found)
