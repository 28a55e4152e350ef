"""FastLoRAConv1D replaces transformers' Conv1D and has PEFT's numbers."""

from __future__ import annotations

import copy
import pickle

import peft
import pytest
import torch
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import nn
from transformers.pytorch_utils import Conv1D

import fastlora
from fastlora import FastLoRAConv1D, FastLoRALinear
from tests.support.helpers import Spy, same_bits
from tests.support.models import (
    TOLERANCE,
    assert_agree,
    error,
    quiet,
    randomise_lora,
    untouched,
)

pytestmark = quiet


def conv1d_base(dtype: torch.dtype = torch.float32) -> Conv1D:
    """12 to 20, with a weight and a bias that matter."""
    conv = Conv1D(20, 12)
    nn.init.normal_(conv.weight)
    nn.init.normal_(conv.bias)
    return conv.to(dtype)


def layer(dtype: torch.dtype = torch.float32, **options) -> FastLoRAConv1D:
    return randomise_lora(FastLoRAConv1D.from_conv1d(conv1d_base(dtype), r=4, **options), 2.0)


def peft_twin(ours: FastLoRAConv1D) -> PeftLinear:
    config = peft.LoraConfig(
        r=4,
        fan_in_fan_out=True,
        lora_alpha=ours.lora_alpha,
        use_rslora=ours.use_rslora,
        lora_bias=ours.lora_bias is not None,
    )
    conv = conv1d_base(ours.weight.dtype).requires_grad_(False)
    conv.load_state_dict({k: ours.state_dict()[k] for k in ("weight", "bias")})
    twin = PeftLinear(conv, "default", config, r=4, lora_alpha=ours.lora_alpha)
    with torch.no_grad():
        twin.lora_A["default"].weight.copy_(ours.lora_A)
        twin.lora_B["default"].weight.copy_(ours.lora_B)
        if ours.lora_bias is not None:
            twin.lora_B["default"].bias.copy_(ours.lora_bias)
    return twin.eval()


def test_conv1d_has_attributes_and_state_of_base():
    conv = conv1d_base()
    ours = FastLoRAConv1D.from_conv1d(conv, r=4, lora_bias=True)
    shapes = {name: tuple(t.shape) for name, t in ours.state_dict().items()}
    assert shapes == {
        "weight": (12, 20),
        "bias": (20,),
        "lora_A": (4, 12),
        "lora_B": (20, 4),
        "lora_bias": (20,),
    }
    assert (ours.nf, ours.nx) == (conv.nf, conv.nx) == (20, 12)
    assert "nf=20, nx=12, r=4" in repr(ours)
    other = FastLoRAConv1D(20, 12, r=4, dtype=torch.bfloat16)
    assert (other.weight.shape, other.lora_A.dtype) == ((12, 20), torch.float32)
    adapter = ours.lora_B.detach().clone()
    ours.load_state_dict(conv1d_base().state_dict(), strict=True)
    assert same_bits(ours.lora_B, adapter)


def test_from_conv1d_shares_and_freezes_the_weight():
    conv, seen = conv1d_base().eval(), []
    conv.register_forward_hook(lambda *_: seen.append(1))
    conv.note = "kept"
    ours = FastLoRAConv1D.from_conv1d(conv)
    assert ours.weight is conv.weight
    assert not any((ours.weight.requires_grad, ours.bias.requires_grad, ours.training))
    ours(torch.randn(2, 12))
    assert (seen, ours.note) == ([1], "kept")


@pytest.mark.parametrize(
    "options", [{}, {"lora_alpha": 3, "use_rslora": True}, {"lora_bias": True}], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_conv1d_has_outputs_and_gradients_of_peft(dtype, options):
    ours = layer(dtype, **options)
    theirs = peft_twin(ours)
    x, upstream = torch.randn(2, 7, 12, dtype=dtype), torch.randn(2, 7, 20, dtype=dtype)
    xs = [x.clone().requires_grad_() for _ in range(2)]
    got, want = ours(xs[0]), theirs(xs[1])
    tolerance = 1e-12 if dtype == torch.float64 else TOLERANCE[dtype]
    assert error(got, want) <= tolerance
    assert error(x.flatten(0, 1) @ ours.weight + ours.bias, want.flatten(0, 1)) >= 5 * tolerance
    for y in (got, want):
        y.backward(upstream)
    lora_A, lora_B = (getattr(theirs, f"lora_{part}")["default"].weight for part in "AB")
    pairs = [(xs[0], xs[1]), (ours.lora_A, lora_A), (ours.lora_B, lora_B)]
    if ours.lora_bias is not None:
        pairs.append((ours.lora_bias, theirs.lora_B["default"].bias))
    for one, other in pairs:
        assert error(one.grad, other.grad) <= tolerance
    assert ours.weight.grad is None


def test_unfrozen_conv1d_weight_gets_its_gradient():
    ours = layer()
    ours.weight.requires_grad_(True)
    x = torch.randn(5, 12)
    ours(x).sum().backward()
    assert error(ours.weight.grad, x.T @ torch.ones(5, 20)) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("rows", [1, 300])
def test_conv1d_weight_is_never_copied(rows):
    """No tensor of its size is made, forward or backward; (384, 512) against 300 * 512."""
    ours = FastLoRAConv1D.from_conv1d(Conv1D(512, 384), r=4)
    x = torch.randn(rows, 384, requires_grad=True)
    with Spy() as spy:
        ours(x).sum().backward()
    assert spy.sizes()[0] < 384 * 512
    assert x.grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("frozen", [True, False])
def test_conv1d_merge_and_unmerge_restore_bits(dtype, frozen):
    ours = layer(dtype, lora_bias=True).eval()
    ours.weight.requires_grad_(not frozen)
    before, at = ours.weight.detach().clone(), ours.weight.data_ptr()
    x = torch.randn(3, 12, dtype=dtype)
    want = ours(x)
    with torch.no_grad():
        wanted = before.double() + (ours.scaling * ours.lora_B @ ours.lora_A).T.double()
    ours.merge()
    assert error(ours(x), want) <= 2 * TOLERANCE.get(dtype, 1e-5)
    assert error(ours.weight, wanted) <= torch.finfo(dtype).eps
    assert ours.fidelity.gain > 0.99
    with pytest.raises(RuntimeError, match="applied twice"):
        ours.state_dict()
    ours.unmerge()
    assert same_bits(ours.weight, before)
    assert ours.weight.data_ptr() == at


class OwnConv1D(Conv1D):
    pass


def test_from_conv1d_refuses_other_modules():
    for module, says in [
        (nn.Linear(4, 4), "it is for FastLoRALinear.from_linear"),
        (OwnConv1D(4, 4), "a subclass of Conv1D with behaviour of its own"),
        (nn.Conv1d(4, 4, 1), "not an nn.Linear"),
        (layer(), "already"),
    ]:
        with untouched(module), pytest.raises(TypeError, match=f"linear: .*{says}"):
            FastLoRAConv1D.from_conv1d(module)
    with pytest.raises(TypeError, match=r"linear: it is for FastLoRAConv1D.from_conv1d"):
        FastLoRALinear.from_linear(conv1d_base())
    with pytest.raises(ValueError, match="r: expected"):
        FastLoRAConv1D(4, 4, r=0)
    with pytest.raises(ValueError, match="init_lora_weights: 'pissa' splits a weight"):
        FastLoRAConv1D(4, 4, init_lora_weights="pissa")


def test_conv1d_survives_copy_and_pickle():
    ours, x = layer(), torch.randn(3, 12)
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(twin) is FastLoRAConv1D
        assert same_bits(twin(x), ours(x))


def test_conv1d_compiles_in_one_graph():
    torch.compiler.reset()
    ours, x = layer(), torch.randn(3, 12)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    want = ours(x)
    want.sum().backward()
    grad, ours.lora_A.grad = ours.lora_A.grad, None
    got = compiled(x)
    got.sum().backward()
    assert_agree(got, want, x @ ours.weight + ours.bias)
    assert error(ours.lora_A.grad, grad) <= TOLERANCE[torch.float32]


def test_conv1d_row_has_same_bits_in_batch():
    ours, x = layer(), torch.randn(9, 12)
    with fastlora.batch_invariant():
        assert same_bits(ours(x)[4:5], ours(x[4:5]))
