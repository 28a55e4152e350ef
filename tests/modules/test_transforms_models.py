"""Models copied, pickled, moved, made without values, parametrised and traced as graphs."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensorMode
from torch.nn.utils import parametrizations, parametrize, prune, skip_init
from torch.optim.swa_utils import AveragedModel

import fastlora
from fastlora import FastLoRALinear, LoRAConfig, MultiLoRALinear
from tests.support.blocks import (
    Block,
    adapters_by_name,
    batch,
    block,
    gradients,
    randomise_adapters,
)
from tests.support.helpers import assert_near, same_bits

CONFIG = LoRAConfig(r=4, target_modules="all-linear", lora_dropout=0.5)


def save_and_load(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def outputs_in_process(shared: nn.Module, pickled: bytes, x: Tensor) -> list[Tensor]:
    """In another process: what the model gives whose memory is shared, and a copy, unmerged."""
    y, own = shared(x), pickle.loads(pickled)
    assert same_bits(own(x), y)
    if own.q.merged:
        fastlora.unmerge_adapter(own)
    return [y.detach(), own(x).detach()]


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), save_and_load]
)
def test_copied_model_is_whole_and_independent(copied, merged):
    ours, x = block(lora_bias=True, lora_dropout=0.5).eval(), batch()
    before = {name: t.clone() for name, t in ours.state_dict().items()}
    if merged:
        fastlora.merge_adapter(ours)
    twin = copied(ours)
    assert same_bits(twin(x), ours(x))
    assert fastlora.report(twin).merged == fastlora.report(ours).merged
    if merged:
        fastlora.unmerge_adapter(twin)
        fastlora.unmerge_adapter(ours)
    for model in (twin, ours):
        assert all(same_bits(t, before[name]) for name, t in model.state_dict().items())
    with torch.no_grad():
        twin.q.lora_B.add_(1)
    assert same_bits(ours.q.lora_B.detach(), before["q.lora_B"])


@pytest.mark.parametrize("merged", [False, True])
def test_another_process_gets_a_whole_copy(merged):
    ours, x = block().eval(), batch()
    want = [ours(x)] * 2
    if merged:
        fastlora.merge_adapter(ours)
        want = [ours(x), want[1]]
    with mp.get_context("spawn").Pool(1) as pool:
        got = pool.apply(outputs_in_process, (ours, pickle.dumps(ours), x))
    assert all(map(same_bits, got, want))
    if merged:
        fastlora.unmerge_adapter(ours)


def test_shallow_copy_shares_weight_unless_merged():
    """Of a merged layer it would go on believing so after the other one was unmerged."""
    ours, x = block().q.eval(), batch()
    twin = copy.copy(ours)
    assert twin.weight is ours.weight
    assert same_bits(twin(x), ours(x))
    ours.merge()
    with pytest.raises(RuntimeError, match=r"merged: a shallow copy .* use copy\.deepcopy"):
        copy.copy(ours)


def test_averaged_model_averages_adapters():
    ours, x = block().eval(), batch()
    average = AveragedModel(ours)
    for _ in range(3):
        average.update_parameters(randomise_adapters(ours))
    assert not torch.equal(average(x), ours(x))
    average.module.load_state_dict(ours.state_dict())
    assert same_bits(average(x), ours(x))


@pytest.mark.parametrize("assign", [False, True])
def test_meta_model_takes_values_from_state(assign):
    with torch.device("meta"):
        ours = fastlora.replace_linear(Block(), CONFIG)
        assert ours(torch.empty(3, 5, 12)).is_meta
    assert {p.device.type for p in ours.parameters()} == {"meta"}
    trained = {n for n, p in ours.named_parameters() if p.requires_grad}
    other, x = block(lora_dropout=0.5).eval(), batch()
    if assign:
        ours.load_state_dict(other.state_dict(), assign=True)
    else:
        ours.to_empty(device="cpu")
        for parameter in ours.parameters():
            parameter.data.fill_(torch.nan)
        for module in ours.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        assert bool(ours(x).isfinite().all())
        assert not any(bool(t.any()) for n, t in adapters_by_name(ours).items() if "lora_B" in n)
        ours.load_state_dict(other.state_dict())
    assert same_bits(ours.eval()(x), other(x))
    assert {n for n, p in ours.named_parameters() if p.requires_grad} == trained


def test_layer_made_by_skip_init_can_initialise():
    layer = skip_init(FastLoRALinear, 12, 20, r=4, lora_bias=True)
    layer.reset_parameters()
    assert not layer.lora_B.any()
    assert layer.lora_A.std() > 0


def test_model_runs_and_trains_on_fake_tensors():
    with FakeTensorMode():
        ours = fastlora.replace_linear(Block(), CONFIG)
        y = ours(torch.empty(3, 5, 12, requires_grad=True))
        y.sum().backward()
    assert tuple(y.shape) == (3, 5, 12)
    assert tuple(ours.q.lora_A.grad.shape) == (4, 12)


def test_model_runs_with_accelerate_empty_weights():
    accelerate = pytest.importorskip("accelerate")
    with accelerate.init_empty_weights():
        ours = fastlora.replace_linear(Block(), CONFIG)
    other, x = block().eval(), batch()
    ours.load_state_dict(other.state_dict(), assign=True)
    want = ours.eval()(x)
    assert same_bits(want, other(x))
    accelerate.cpu_offload(ours)
    assert {p.device.type for p in ours.parameters()} == {"meta"}
    assert same_bits(ours(x), want)
    with pytest.raises(RuntimeError, match=r"q: weight: expected values, .*\(offloaded\?\)"):
        fastlora.merge_adapter(ours)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_model_moved_to_dtype_equals_peft(dtype):
    peft = pytest.importorskip("peft")
    from tests.support.models import TOLERANCE, error

    ours, x = block(), batch()
    base = Block()
    base.load_state_dict({n: t for n, t in ours.state_dict().items() if "lora_" not in n})
    targets = ["q", "k", "v", "o", "up", "down"]
    theirs = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=targets))
    peft.set_peft_model_state_dict(theirs, fastlora.adapter_state_dict(ours))
    ours, theirs, x = ours.to(dtype), theirs.to(dtype), x.to(dtype)
    assert {p.dtype for p in ours.parameters()} == {p.dtype for p in theirs.parameters()} == {dtype}
    tolerance = TOLERANCE.get(dtype, 1e-12)
    assert error(ours(x), theirs(x)) <= tolerance
    with theirs.disable_adapter():
        assert error(theirs(x), ours(x)) >= 2 * tolerance
    assert all(g.dtype == dtype for g in gradients(ours, ours, x))
    assert {p.device.type for p in ours.to("meta").parameters()} == {"meta"}


class Doubled(nn.Module):
    def forward(self, t: Tensor) -> Tensor:
        return 2 * t


def test_parametrised_adapter_runs_and_trains():
    ours, x = block().q, batch()
    plain = copy.deepcopy(ours)
    parametrize.register_parametrization(ours, "lora_A", Doubled())
    with torch.no_grad():
        plain.lora_A.mul_(2)
    assert_near(ours(x), plain(x))
    got, want = gradients(ours, ours, x), gradients(plain, plain, x)
    assert_near(got[0], want[0])
    assert_near(ours.parametrizations.lora_A.original.grad, 2 * plain.lora_A.grad)
    twin = copy.deepcopy(ours)
    twin.load_state_dict(ours.state_dict())
    assert same_bits(twin(x), ours(x))
    weight = ours.weight.detach().clone()
    ours.eval().merge()
    assert_near(ours(x), plain.eval()(x))
    ours.unmerge()
    assert same_bits(ours.weight.detach(), weight)


def test_parametrised_adapter_is_not_saved_or_loaded(tmp_path):
    ours = block()
    fastlora.save_adapter(block(lora_alpha=2), tmp_path)
    parametrizations.orthogonal(ours.down, "lora_A")
    before = {name: t.clone() for name, t in ours.state_dict().items()}
    for refused in (
        lambda: fastlora.adapter_state_dict(ours),
        lambda: fastlora.save_adapter(ours, tmp_path / "new"),
        lambda: fastlora.load_adapter(ours, tmp_path),
    ):
        with pytest.raises(RuntimeError, match="lora_A: expected a parameter, but it is computed"):
            refused()
    assert not (tmp_path / "new").exists()
    assert all(same_bits(t, before[name]) for name, t in ours.state_dict().items())
    assert ours.q.lora_alpha == 8


COMPUTED = {
    "parametrize": lambda m: parametrize.register_parametrization(m, "weight", Doubled()),
    "weight_norm": parametrizations.weight_norm,
    "old weight_norm": nn.utils.weight_norm,
    "prune": lambda m: prune.l1_unstructured(m, "weight", 20),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("how", COMPUTED)
def test_computed_weight_runs_but_does_not_merge(how):
    ours, x = block(), batch()
    merged = copy.deepcopy(ours).eval()
    COMPUTED[how](ours.q)
    y = ours.q(x)
    plain = FastLoRALinear(12, 12, r=4)
    with torch.no_grad():
        for name in ("weight", "bias", "lora_A", "lora_B"):
            getattr(plain, name).copy_(getattr(ours.q, name))
    assert_near(y, plain(x))
    for refused in (ours.q.merge, lambda: fastlora.merge_adapter(ours)):
        with pytest.raises(RuntimeError, match="weight: expected a parameter, but it is computed"):
            refused()
    assert same_bits(ours.q(x), y)
    fastlora.merge_adapter(merged)
    COMPUTED[how](merged.q)
    with pytest.raises(RuntimeError, match="q: weight: expected a parameter"):
        fastlora.unmerge_adapter(merged)


@pytest.mark.parametrize("state", ["training", "dropout", "merged"])
def test_symbolic_trace_of_model_has_its_numbers(state):
    ours, x = block(lora_bias=True, lora_dropout=0.5 if state == "dropout" else 0.0), batch()
    if state == "merged":
        fastlora.merge_adapter(ours.eval())
    traced = fx.symbolic_trace(ours)
    calls = [n for n in traced.graph.nodes if getattr(n.target, "__name__", "") == "lora_linear"]
    assert len(calls) == (0 if state == "merged" else 6)
    if state == "dropout":
        assert not torch.equal(traced(x), traced(x))
    if state == "merged":
        assert same_bits(traced(x), ours(x))
        return
    again = pickle.loads(pickle.dumps(traced))
    want = gradients(ours, ours, x)
    for graph in (traced, again):
        assert all(map(same_bits, gradients(graph, graph, x), want))


def test_symbolic_trace_needs_explicit_adapter_ids():
    """Where a layer is told whose its rows are it can be traced, where it must ask it cannot."""
    layer, x = MultiLoRALinear.from_linear(nn.Linear(12, 7), 2, 4), torch.randn(3, 12)
    layer.set_adapter(0, torch.randn(4, 12), torch.randn(7, 4), 0.5)
    ids = torch.tensor([0, -1, 1])
    assert same_bits(fx.symbolic_trace(layer)(x, ids), layer(x, ids))
    ours = fastlora.replace_linear(Block(), CONFIG, adapter_names=["anna", "ben"])
    with fastlora.use_adapters(ours, ["anna", "ben"]), pytest.raises(fx.proxy.TraceError):
        fx.symbolic_trace(ours)
