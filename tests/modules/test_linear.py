"""FastLoRALinear is an nn.Linear with PEFT's numbers."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from fastlora import FastLoRALinear, use_backend
from tests.support.helpers import same_bits
from tests.support.models import TOLERANCE, assert_agree, error, randomise_lora, untouched

HALVES = [torch.bfloat16, torch.float16]
pytestmark = pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")


def layer(**options) -> FastLoRALinear:
    """(12 -> 20), r=4, with an adapter that matters."""
    return randomise_lora(FastLoRALinear(12, 20, r=4, **options), 2.0)


def peft_twin(ours: FastLoRALinear) -> PeftLinear:
    """PEFT's layer around a copy of the same base, with the same adapter."""
    base = nn.Linear(ours.in_features, ours.out_features, ours.bias is not None)
    base = base.to(ours.weight.dtype).requires_grad_(False)
    base.load_state_dict({k: v for k, v in ours.state_dict().items() if "lora" not in k})
    config = peft.LoraConfig(
        r=ours.r,
        lora_alpha=ours.lora_alpha,
        lora_dropout=ours.lora_dropout,
        use_rslora=ours.use_rslora,
        lora_bias=ours.lora_bias is not None,
    )
    twin = PeftLinear(base, "default", config, r=ours.r, lora_alpha=ours.lora_alpha)
    with torch.no_grad():
        twin.lora_A["default"].weight.copy_(ours.lora_A)
        twin.lora_B["default"].weight.copy_(ours.lora_B)
        if ours.lora_bias is not None:
            twin.lora_B["default"].bias.copy_(ours.lora_bias)
    return twin.train(ours.training)


def base_output(ours: FastLoRALinear, x: Tensor) -> Tensor:
    return nn.functional.linear(x, ours.weight, ours.bias)


def test_layer_is_linear_with_adapter_in_state():
    ours = FastLoRALinear(12, 20, r=4, lora_bias=True)
    assert isinstance(ours, nn.Linear)
    shapes = {name: tuple(t.shape) for name, t in ours.state_dict().items()}
    assert shapes == {
        "weight": (20, 12),
        "bias": (20,),
        "lora_A": (4, 12),
        "lora_B": (20, 4),
        "lora_bias": (20,),
    }
    assert list(FastLoRALinear(12, 20, bias=False).state_dict()) == ["weight", "lora_A", "lora_B"]
    assert "r=4" in repr(ours)


def test_layer_loads_base_state_but_no_half_adapter():
    base, ours = nn.Sequential(nn.Linear(12, 20)), nn.Sequential(layer())
    adapter = ours[0].lora_B.clone()
    ours.load_state_dict(base.state_dict(), strict=True)
    assert same_bits(ours[0].weight, base[0].weight)
    assert same_bits(ours[0].lora_B, adapter)
    torn = ours.state_dict()
    del torn["0.lora_B"]
    with pytest.raises(RuntimeError, match=r"Missing key.*0\.lora_B"):
        ours.load_state_dict(torn, strict=True)
    whole = nn.Sequential(layer())
    whole.load_state_dict(ours.state_dict())
    assert same_bits(whole[0].lora_B, adapter)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lora_alpha": 3},
        {"use_rslora": True, "lora_alpha": 2.5},
        {"lora_bias": True},
        {"lora_dropout": 0.5},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_layer_has_outputs_and_gradients_of_peft(dtype, options, bias):
    ours = layer(dtype=dtype, bias=bias, **options).eval()
    ours.weight.requires_grad_(False)
    if ours.bias is not None:
        ours.bias.requires_grad_(False)
    theirs = peft_twin(ours)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert ours.lora_A.dtype == theirs.lora_A["default"].weight.to(wide).dtype == wide
    x = torch.randn(2, 7, 12, dtype=dtype)
    upstream = torch.randn(2, 7, 20, dtype=dtype)
    xs = [x.clone().requires_grad_() for _ in range(2)]
    got, want = ours(xs[0]), theirs(xs[1])
    tolerance = 1e-12 if dtype == torch.float64 else TOLERANCE[dtype]
    assert got.dtype == want.dtype
    assert error(got, want) <= tolerance
    assert error(base_output(ours, x), want) >= 10 * tolerance
    (got * upstream).sum().backward()
    (want * upstream).sum().backward()
    pairs = [
        (xs[0], xs[1]),
        (ours.lora_A, theirs.lora_A["default"].weight),
        (ours.lora_B, theirs.lora_B["default"].weight),
    ]
    if ours.lora_bias is not None:
        pairs.append((ours.lora_bias, theirs.lora_B["default"].bias))
    for mine, other in pairs:
        assert error(mine.grad, other.grad) <= tolerance
    assert ours.weight.grad is None


@pytest.mark.parametrize("kind", [True, False, "gaussian"])
def test_layer_is_initialised_as_by_peft(kind):
    """The same distribution; for False, where PEFT draws once, the very numbers."""
    base, config = nn.Linear(256, 64), peft.LoraConfig(r=16, init_lora_weights=kind)
    torch.manual_seed(5)
    theirs = PeftLinear(copy.deepcopy(base), "default", config, r=16, lora_alpha=8)
    torch.manual_seed(5)
    ours = FastLoRALinear.from_linear(base, r=16, init_lora_weights=kind)
    A, B = theirs.lora_A["default"].weight, theirs.lora_B["default"].weight
    assert bool((ours.lora_B == 0).all()) == bool((B == 0).all()) == (kind is not False)
    # 4096 draws: the sample deviation is within 5 % but once in some 10**5 seeds.
    assert ours.lora_A.std().item() == pytest.approx(A.std().item(), rel=0.05)
    bounded = [bool((t.abs() <= 256**-0.5).all()) for t in (ours.lora_A, A)]
    assert bounded == [kind != "gaussian"] * 2
    if kind is False:
        assert same_bits(ours.lora_A.detach(), A.detach())
        assert same_bits(ours.lora_B.detach(), B.detach())


@use_backend("torch")  # whose base product is nn.Linear's, bit for bit
def test_from_linear_shares_freezes_and_inherits():
    calls = []
    linear = nn.Linear(12, 20).eval()
    linear.register_forward_hook(lambda *_: calls.append("before"))
    linear.note = "kept"
    ours = FastLoRALinear.from_linear(linear, r=4)
    assert ours.weight is linear.weight
    assert ours.bias is linear.bias
    assert not ours.weight.requires_grad
    assert not ours.bias.requires_grad
    assert not ours.training
    assert ours.note == "kept"
    handle = ours.register_forward_hook(lambda *_: calls.append("after"))
    x = torch.randn(3, 12)
    assert same_bits(ours(x), linear(x))  # lora_B is zero
    assert same_bits(ours(input=x), ours(x))
    assert calls[:2] == ["before", "after"]
    handle.remove()


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32, torch.float64])
def test_adapters_are_float32_unless_asked_otherwise(dtype):
    linear = nn.Linear(12, 20, dtype=dtype)
    wide = torch.float32 if dtype in HALVES else dtype
    assert FastLoRALinear.from_linear(linear).lora_A.dtype == wide
    for own in (torch.bfloat16, torch.float32):
        narrow = randomise_lora(FastLoRALinear.from_linear(linear, lora_dtype=own))
        assert narrow.lora_B.dtype == own
        x = torch.randn(3, 12, dtype=dtype)
        assert narrow(x).dtype == dtype
        assert error(narrow(x), linear(x)) > 0.1


class Odd(nn.Linear):
    pass


def changed(name: str, value: object) -> nn.Linear:
    linear = nn.Linear(4, 4)
    if isinstance(value, Tensor):
        linear.register_buffer(name, value)
    else:
        setattr(linear, name, value)
    return linear


UNUSUAL = {
    "a subclass": lambda: Odd(4, 4),
    "already": lambda: FastLoRALinear(4, 4),
    "not an nn.Linear": lambda: nn.Embedding(4, 4),
    "ParametrizedLinear": lambda: parametrize.register_parametrization(
        nn.Linear(4, 4), "weight", nn.ReLU()
    ),
    "weight is computed": lambda: nn.utils.weight_norm(nn.Linear(4, 4)),
    "bias_mask": lambda: prune.l1_unstructured(nn.Linear(4, 4), "bias", 1),
    "more than a weight and a bias: scale": lambda: changed("scale", torch.ones(4)),
    "forward was replaced": lambda: changed("forward", lambda input: input),
    "float8": lambda: nn.Linear(4, 4).to(torch.float8_e4m3fn),
    "complex64": lambda: nn.Linear(4, 4, dtype=torch.complex64),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("reason", UNUSUAL)
def test_from_linear_refuses_unusual_modules(reason):
    module = UNUSUAL[reason]()
    with untouched(module), pytest.raises(TypeError, match=f"linear: .*{reason}"):
        FastLoRALinear.from_linear(module)


@pytest.mark.parametrize(
    "options, kind",
    [
        ({"r": 0}, ValueError),
        ({"r": 2.0}, TypeError),
        ({"lora_alpha": float("nan")}, ValueError),
        ({"lora_dropout": 2}, ValueError),
        ({"init_lora_weights": "eva"}, ValueError),
        ({"init_lora_weights": "pissa", "r": 13}, ValueError),
        ({"init_lora_weights": "orthogonal", "r": 3}, ValueError),
        ({"lora_dtype": torch.int8}, ValueError),
        ({"lora_dtype": "float32"}, ValueError),
        ({"dtype": torch.float64}, TypeError),
        ({"bias": False}, TypeError),
    ],
)
def test_from_linear_names_bad_options_and_changes_nothing(options, kind):
    linear = nn.Linear(12, 20)
    with untouched(linear), pytest.raises(kind, match=next(iter(options))):
        FastLoRALinear.from_linear(linear, **options)


def test_autocast_runs_half_and_trains_float32():
    ours = layer()
    theirs = peft_twin(ours)
    x = torch.randn(5, 12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, want = ours(x), theirs(x)
    assert_agree(got, want, base_output(ours, x).to(want.dtype))
    got.float().square().sum().backward()
    want.float().square().sum().backward()
    assert ours.lora_A.grad.dtype == ours.lora_B.grad.dtype == torch.float32
    for mine, other in ((ours.lora_A, theirs.lora_A), (ours.lora_B, theirs.lora_B)):
        assert error(mine.grad, other["default"].weight.grad) <= TOLERANCE[torch.bfloat16]
