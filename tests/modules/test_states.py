"""FastLoRALinear copied, moved, trained, merged and compiled."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastlora
from fastlora import FastLoRALinear
from tests.support.helpers import same_bits
from tests.support.models import TOLERANCE, error, randomise_lora, untouched

HALVES = [torch.bfloat16, torch.float16]


def layer(**options) -> FastLoRALinear:
    """(12 -> 20), r=4, with an adapter that matters."""
    return randomise_lora(FastLoRALinear(12, 20, r=4, **options), 2.0)


def base_output(ours: FastLoRALinear, x: Tensor) -> Tensor:
    return nn.functional.linear(x, ours.weight, ours.bias)


@pytest.mark.parametrize(
    "how, merged",
    [("deepcopy", False), ("deepcopy", True), ("pickle", False), ("torch", False), ("torch", True)],
)
def test_copy_is_whole_and_independent(how, merged):
    ours = layer(lora_bias=True, lora_dropout=0.1, use_rslora=True).eval()
    weight, x = ours.weight.detach().clone(), torch.randn(3, 12)
    if merged:
        ours.merge()
    want = ours(x)
    if how == "deepcopy":
        twin = copy.deepcopy(ours)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(ours))
    else:
        file = io.BytesIO()
        torch.save(ours, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert same_bits(twin(x), want)
    assert (twin.merged, twin.scaling, twin.lora_dropout) == (merged, ours.scaling, 0.1)
    if merged:
        twin.unmerge()
    assert same_bits(twin.weight.detach(), weight)
    assert ours.merged == merged
    assert twin.weight.data_ptr() != ours.weight.data_ptr()


def test_layer_moves_from_meta_to_memory():
    ours = FastLoRALinear(12, 20, r=4, lora_bias=True, device="meta", dtype=torch.bfloat16)
    assert {p.device.type for p in ours.parameters()} == {"meta"}
    ours.to_empty(device="cpu")
    for parameter in ours.parameters():
        parameter.data.fill_(float("nan"))
    ours.reset_parameters()
    x = torch.randn(3, 12, dtype=torch.bfloat16)
    assert same_bits(ours(x), base_output(ours, x))
    assert bool(ours(x).isfinite().all())
    assert ours.lora_A.std().item() > 0
    assert ours.lora_A.dtype == torch.float32


@pytest.mark.parametrize("dtype", [*HALVES, torch.float64])
def test_moving_to_dtype_moves_every_parameter(dtype):
    ours = layer().eval()
    x = torch.randn(3, 12)
    want = ours(x).detach()
    moved = copy.deepcopy(ours).to(dtype)
    assert {p.dtype for p in moved.parameters()} == {dtype}
    tolerance = TOLERANCE.get(dtype, 1e-5)
    assert error(moved(x.to(dtype)), want) <= tolerance


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_recomputes_the_same_dropout(use_reentrant):
    ours = layer(lora_dropout=0.5)
    x = torch.randn(5, 12, requires_grad=True)
    grads = []
    for run in (ours, lambda x: checkpoint(ours, x, use_reentrant=use_reentrant)):
        torch.manual_seed(3)
        run(x).square().sum().backward()
        grads.append([t.grad.clone() for t in (x, ours.lora_A, ours.lora_B)])
        x.grad = None
        ours.zero_grad()
    assert all(same_bits(a, b) for a, b in zip(*grads, strict=True))


def test_dropout_acts_only_on_adapter_in_training():
    """Its mean is what eval computes: 2000 draws, to five standard errors."""
    ours = layer(lora_dropout=0.3)
    x = torch.randn(1, 12)
    draws = ours(x.expand(2000, 12)).detach()
    want = ours.eval()(x).detach()
    assert same_bits(ours(x), ours(x))
    assert bool((draws.std(0) > 0).all())
    assert bool(((draws.mean(0) - want).abs() < 5 * draws.std(0) / 2000**0.5).all())
    ours.train().lora_dropout = 1.0
    assert same_bits(ours(x), base_output(ours, x))


def test_optimizer_moves_only_the_adapter():
    ours = FastLoRALinear.from_linear(nn.Linear(12, 20), r=4)
    before = {name: t.clone() for name, t in ours.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in ours.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):  # the first step leaves lora_A: its gradient is zero while lora_B is
        ours(torch.randn(8, 12)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {name for name, t in ours.state_dict().items() if not torch.equal(t, before[name])}
    assert moved == {"lora_A", "lora_B"}


REFUSED_WHEN_MERGED = {
    "merge": lambda m: m.merge(),
    "train": lambda m: m(torch.randn(3, 12)),
    "state_dict": lambda m: m.state_dict(),
    "load_state_dict": lambda m: m.load_state_dict(layer().state_dict()),
}


@pytest.mark.parametrize("action", REFUSED_WHEN_MERGED)
def test_merged_layer_refuses_changes_to_adapter(action):
    ours = layer()
    weight = ours.weight.detach().clone()
    ours.merge()
    with untouched(ours), pytest.raises(RuntimeError, match="merged"):
        REFUSED_WHEN_MERGED[action](ours)
    ours.unmerge()
    assert same_bits(ours.weight.detach(), weight)


def test_merged_layer_cannot_be_unmerged_after_cast():
    ours = layer()
    x = torch.randn(3, 12)
    ours.eval().merge()
    want = ours(x)
    ours.double()
    assert torch.allclose(ours(x.double()).float(), want, atol=1e-5)  # float32's rounding
    with untouched(ours), pytest.raises(TypeError, match=r"the receipt is for torch\.float32"):
        ours.unmerge()


def test_merged_layer_unmerges_after_pickle():
    ours = layer()
    plain = ours.weight.detach().clone()
    ours.merge()
    copy = pickle.loads(pickle.dumps(ours))
    copy.unmerge()
    assert same_bits(copy.weight.detach(), plain)


@pytest.mark.parametrize("frozen", ["lora_A", "lora_B"])
def test_merged_layer_refuses_training_half_an_adapter(frozen):
    ours = layer()
    ours.merge()
    getattr(ours, frozen).requires_grad_(False)
    with pytest.raises(RuntimeError, match="merged"):
        ours(torch.randn(3, 12))
    ours.adapter_parameters()["lora_A" if frozen == "lora_B" else "lora_B"].requires_grad_(False)
    assert ours(torch.randn(3, 12)).shape == (3, 20)


def test_merge_and_unmerge_refuse_unfit_layers():
    ours = layer(lora_bias=True)
    with untouched(ours), pytest.raises(RuntimeError, match="not merged"):
        ours.unmerge()
    for bad in (ours.lora_A, ours.lora_bias):
        kept = bad.detach().clone()
        bad.data.view(-1)[1] = float("inf")
        with untouched(ours), pytest.raises(ValueError, match="finite"):
            ours.merge()
        bad.data.copy_(kept)
    ours.adapter_disabled = True
    with untouched(ours), pytest.raises(RuntimeError, match="disabled"):
        ours.merge()


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_layer_compiles_in_one_graph_with_backward(compiler, dropout):
    torch.compiler.reset()
    ours = layer(lora_dropout=dropout, lora_bias=True)
    compiled = torch.compile(ours, fullgraph=True, backend=compiler)
    x = torch.randn(5, 12, requires_grad=True)
    found = []
    for run in (ours, compiled):
        torch.manual_seed(3)
        y = run(x)
        y.square().sum().backward()
        found.append([y, *(t.grad.clone() for t in (x, *ours.parameters()))])
        x.grad = None
        ours.zero_grad()
    if dropout and compiler == "inductor":
        # Inductor draws the seed from a generator of its own: another mask, as good a one.
        assert all(bool(t.isfinite().all()) for t in found[1])
        assert error(found[1][0], base_output(ours, x)) > 0.1
    else:
        assert all(error(b, a) <= TOLERANCE[torch.float32] for a, b in zip(*found, strict=True))


def test_compiled_layer_follows_its_state():
    torch.compiler.reset()
    ours = layer(lora_bias=True).eval()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 12)

    def check() -> Tensor:
        y = compiled(x)
        assert error(y, ours(x)) <= TOLERANCE[torch.float32]
        return y

    plain, base = check(), base_output(ours, x)
    assert error(base, plain) > 0.1
    ours.adapter_disabled = True
    assert same_bits(check(), base)
    ours.adapter_disabled = False
    ours.merge()
    assert error(check(), plain) <= TOLERANCE[torch.float32]
    ours.unmerge()
    with fastlora.use_backend("torch"):
        assert error(check(), plain) <= TOLERANCE[torch.float32]
    ours.scaling *= 3
    assert error(check(), plain) > 0.1
