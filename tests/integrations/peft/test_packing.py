"""bitsandbytes never packs 4-bit weights beneath a patched model."""

from __future__ import annotations

import copy
import random
import warnings

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")
bnb = pytest.importorskip("bitsandbytes")

import fastlora  # noqa: E402
from tests.support.helpers import same_bits  # noqa: E402
from tests.support.models import assert_agree, quiet  # noqa: E402
from tests.support.patched import fill_adapters  # noqa: E402

pytestmark = quiet
PACKS = bnb.functional.has_avx512bf16()


class Quantized(nn.Module):
    """4-bit linears with an adapter, without one, and a plain layer below that gradients reach."""

    is_loaded_in_4bit = is_loaded_in_8bit = True  # what a quantizing loader of transformers notes

    def __init__(self, sizes=(128, 64, 128), dtype=torch.float32, blocksize=64, **options) -> None:
        super().__init__()
        K, N, M = sizes
        self.below = nn.Linear(16, K)
        options = {"compute_dtype": dtype, "bias": False} | options
        self.four, self.mid = (bnb.nn.Linear4bit(*of, **options) for of in ((K, N), (N, M)))
        for layer in (self.four, self.mid):
            layer.weight.blocksize = blocksize
            # Machines that pack nothing of themselves are told to.
            layer.support_avx512bf16_for_cpu = True
        self.head = nn.Linear(M, 8)

    def forward(self, x):
        return self.head(self.mid(self.four(self.below(x).relu())))


def models_with_and_without_packing(**options):
    """A PEFT model, and one that is never packed."""
    torch.manual_seed(1)
    settings = peft.LoraConfig(r=4, target_modules=["below", "four"])
    model = fill_adapters(peft.get_peft_model(Quantized(**options).to("cpu"), settings))
    never = copy.deepcopy(model)
    for layer in four_bit_layers(never):
        layer.support_avx512bf16_for_cpu = False
    return model, never


def four_bit_layers(model):
    return [each for each in model.modules() if isinstance(each, bnb.nn.Linear4bit)]


def packed_flags(model):
    return [
        bool(getattr(e.weight.quant_state, "packing_format_for_cpu", False))
        for e in four_bit_layers(model)
    ]


def pack(model):
    """What an eval forward without us does, where it does."""
    model.eval()
    if PACKS:
        with torch.no_grad():
            model(torch.randn(2, 16))
    for layer in four_bit_layers(model):
        weight = layer.weight
        if not getattr(weight.quant_state, "packing_format_for_cpu", False):
            assert not PACKS
            convert = bnb.functional._convert_weight_packed_for_cpu
            weight.data, _ = convert(weight.data, weight.quant_state)


def round_absmax(model):
    """What packing loses."""
    for layer in four_bit_layers(model):
        state = layer.weight.quant_state
        if state.nested:
            state.absmax = bnb.functional.dequantize_blockwise(state.absmax, state.state2)
            state.absmax += state.offset
            state.nested, state.offset, state.state2 = False, None, None
        state.absmax = state.absmax.bfloat16().float()


def forward(model):
    model.eval()
    with torch.no_grad():
        return [model(torch.randn(3, 16))]


def step(model):
    """Gradients of all that trains; in eval mode too, as some train a head."""
    if model.base_model.model.four.merged:
        return []
    model.train(random.random() < 0.7)
    model.zero_grad()
    model(torch.randn(5, 16)).square().sum().backward()
    assert not any(packed_flags(model))
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def merging(model):
    if model.base_model.model.four.merged:
        model.unmerge_adapter()
    else:
        model.merge_adapter()
    return forward(model)


def saving(model):
    """The bits of the quantized layers; others PEFT merges with another rounding."""
    named = sorted(model.state_dict().items())
    return [t for name, t in named if ".four.base_layer" in name or ".mid." in name]


def magnitudes(model):
    """Of a DoRA adapter, which are the base's norms."""
    if model.base_model.model.four.merged:
        return []
    model.add_adapter("dora", peft.LoraConfig(r=2, target_modules=["four"], use_dora=True))
    found = [p.detach() for name, p in model.named_parameters() if "magnitude" in name]
    model.delete_adapter("dora")
    assert len(found) == 1
    return found


def moved(model):
    model.to("cpu").to(torch.device("cpu"), non_blocking=True)
    return forward(model)


def act_alike(act, model, never, seed=0):
    found = []
    for each in (model, never):
        torch.manual_seed(seed)
        random.seed(seed)
        found.append(act(each))
    return found


ACTS = [forward, step, merging, saving, magnitudes, moved]
BASES = [
    {"quant_type": "nf4"},
    {"quant_type": "nf4", "compress_statistics": False, "dtype": torch.bfloat16},
    {"quant_type": "fp4", "blocksize": 32, "dtype": torch.float16},
    {"quant_type": "fp4", "blocksize": 128, "sizes": (256, 128, 64), "compress_statistics": False},
    {"quant_type": "nf4", "quant_storage": torch.bfloat16},
]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("options", BASES, ids=str)
def test_actions_in_any_order_match_unpacked_model(options, seed):
    """Eval, training, merging, saving, copying, patching, unpatching: as if never packed."""
    model, never = models_with_and_without_packing(**options)
    fastlora.patch_peft(model, strict=True)
    draw, dtype = random.Random(f"{seed} {options}"), options.get("dtype", torch.float32)
    acts = [*ACTS, "copy", "unpatch", "packed"]
    order = [*acts, *draw.choices(acts, k=12)]
    draw.shuffle(order)
    for act in order:
        if act == "copy":
            model, never = copy.deepcopy(model), copy.deepcopy(never)
        elif act == "unpatch":
            fastlora.unpatch_peft(model)
            assert all(each.support_avx512bf16_for_cpu == PACKS for each in four_bit_layers(model))
            with warnings.catch_warnings(action="error", category=UserWarning):
                fastlora.patch_peft(model)
        elif act == "packed":
            model = repacked(model, never, draw)
        else:
            found = act_alike(act, model, never, draw.randrange(1 << 30))
            assert not any(packed_flags(model))
            for got, want in zip(*found, strict=True):
                assert got.dtype == want.dtype
                if act in (step, forward, merging, moved):
                    assert_agree(got.to(dtype), want.to(dtype))
                else:
                    assert same_bits(got, want)


def repacked(model, never, draw):
    """Unpatched, packed, copied perhaps; and patched again, which warns once."""
    fastlora.unpatch_peft(model)
    pack(model)
    assert all(packed_flags(model))
    if draw.random() < 0.5:
        model = copy.deepcopy(model) if draw.random() < 0.5 else model.to("cpu")
    with pytest.warns(UserWarning, match="base_model.model.four.base_layer and 1 more") as said:
        fastlora.patch_peft(model)
    assert len(said) == 1
    assert all(each.quant_state is each.weight.quant_state for each in four_bit_layers(model))
    round_absmax(never)
    return model


@pytest.mark.parametrize("nested", [True, False])
def test_patch_peft_accepts_model_saved_while_packed(nested):
    """bitsandbytes unpacks for a state_dict, and leaves absmax transposed, or quantized anew."""
    model, never = models_with_and_without_packing(compress_statistics=nested)
    pack(model)
    model.state_dict()
    assert not any(packed_flags(model))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", UserWarning)
        fastlora.patch_peft(model)
    assert [str(each.message).startswith("peft_model:") for each in said] == [True] * (not nested)
    if nested:
        for got, want in zip(*act_alike(step, model, never), strict=True):
            assert (got - want).norm() <= 0.03 * want.norm()
        return
    round_absmax(never)
    for got, want in zip(*act_alike(saving, model, never), strict=True):
        assert same_bits(got, want)
    for got, want in zip(*act_alike(step, model, never), strict=True):
        assert_agree(got, want)


@pytest.mark.parametrize("sizes", [(33, 32, 16), (64, 33, 16), (96, 64, 33)])
def test_patched_model_runs_shapes_that_cannot_be_packed(sizes):
    """bitsandbytes alone raises in an eval forward of these, where it packs."""
    # A compiler of its own decodes odd rows, for twenty seconds.
    with torch.compiler.set_stance("force_eager"):
        model, never = models_with_and_without_packing(sizes=sizes)
        fastlora.patch_peft(model)
        for act in (forward, step, merging):
            for got, want in zip(*act_alike(act, model, never), strict=True):
                assert_agree(got, want)


def test_unloaded_base_may_pack_again():
    model, _ = models_with_and_without_packing()
    fastlora.patch_peft(model)
    assert not any(each.support_avx512bf16_for_cpu for each in four_bit_layers(model))
    base = model.merge_and_unload()
    assert [each.support_avx512bf16_for_cpu for each in four_bit_layers(base)] == [PACKS, PACKS]


def test_unpatch_peft_keeps_packing_off_where_disabled():
    _, never = models_with_and_without_packing()
    fastlora.patch_peft(never)
    fastlora.unpatch_peft(never)
    assert not any(each.support_avx512bf16_for_cpu for each in four_bit_layers(never))
