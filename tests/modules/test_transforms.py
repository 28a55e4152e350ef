"""Models under torch's transforms: differentiating, mapping, checkpointing, autocast."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.func import functional_call, grad, jacfwd, jacrev, stack_module_state, vmap
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import fastlora
from fastlora import FastLoRALinear
from fastlora import functional as F
from fastlora.ops import dispatch
from tests.support.blocks import adapters_by_name, batch, block, gradients, unfused_copy
from tests.support.helpers import assert_near, same_bits

HALVES = [torch.bfloat16, torch.float16]


def loss(model: nn.Module):
    return lambda parameters, x: functional_call(model, parameters, (x,)).square().sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_per_sample_gradients_match_unfused_torch(dtype):
    ours, x = block(dtype, lora_bias=True), batch(4, dtype)
    got = vmap(grad(loss(ours)), (None, 0))(adapters_by_name(ours), x)
    want = vmap(grad(loss(unfused_copy(ours))), (None, 0))(adapters_by_name(ours), x)
    assert got.keys() == want.keys()
    largest = max(float(gradient.abs().max()) for gradient in want.values())
    for name, gradient in got.items():
        # Each is a sum of parts as large as the largest gradient of the block.
        torch.testing.assert_close(gradient, want[name], rtol=1e-4, atol=1e-6 * largest)
        assert gradient.dtype == dtype
    # And as a loop over the samples has them.
    for i in range(4):
        ours.zero_grad()
        ours(x[i]).square().sum().backward()
        torch.testing.assert_close(
            got["q.lora_A"][i], ours.q.lora_A.grad, rtol=1e-4, atol=1e-6 * largest
        )


def test_jacobians_of_model_match_unfused_torch():
    ours, x = block(), batch(2)
    plain, given = unfused_copy(ours), adapters_by_name(ours)
    jacobians = [jacrev(lambda p, m=m: functional_call(m, p, (x,)))(given) for m in (ours, plain)]
    for name, got in jacobians[0].items():
        assert got.shape == (*x.shape, *given[name].shape)
        assert_near(got, jacobians[1][name])


def test_ensemble_under_vmap_equals_its_members():
    members, x = [block() for _ in range(3)], batch()
    parameters, buffers = stack_module_state(members)
    skeleton = copy.deepcopy(members[0]).to("meta")

    def run(parameters, buffers, x):
        return functional_call(skeleton, (parameters, buffers), (x,))

    together = vmap(run, (0, 0, None))(parameters, buffers, x)
    assert_near(together, torch.stack([member(x) for member in members]))


def test_forward_mode_of_model_is_refused():
    ours = block()
    with pytest.raises(NotImplementedError, match="jvp"):
        jacfwd(ours)(batch())


@pytest.mark.parametrize("differentiated", [False, True])
@pytest.mark.parametrize("randomness", ["same", "different", "error"])
def test_dropout_under_vmap_follows_its_randomness(randomness, differentiated):
    """x = 1 and factors that are the identity: y is the mask, and so is its gradient for x."""
    eye, ones = torch.eye(64), torch.ones(3, 5, 64)

    def masked(x):
        return F.lora_linear(x, 0 * eye, eye, eye, 1.0, dropout_p=0.5, training=True)

    def run(x):
        return grad(lambda x: masked(x).sum())(x) if differentiated else masked(x)

    if randomness == "error":
        with pytest.raises(RuntimeError, match="randomness"):
            vmap(run, randomness=randomness)(ones)
        return
    masks = vmap(run, randomness=randomness)(ones)
    assert set(masks.unique().tolist()) == {0.0, 2.0}
    pairs = [(0, 1), (0, 2), (1, 2)]
    assert [torch.equal(masks[i], masks[j]) for i, j in pairs] == [randomness == "same"] * 3


def test_backward_under_vmap_has_mask_of_forward():
    eye = torch.eye(64)

    def both(x):
        def masked(x):
            y = F.lora_linear(x, 0 * eye, eye, eye, 1.0, dropout_p=0.5, training=True)
            return y.sum(), y

        return grad(masked, has_aux=True)(x)

    gradient, y = vmap(both, randomness="different")(torch.ones(3, 5, 64))
    assert torch.equal(gradient, y)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_a_model_changes_no_bit(reentrant, autocast):
    ours, x = block(lora_dropout=0.5, lora_bias=True), batch()

    def recomputed(x):
        return checkpoint(ours, x, use_reentrant=reentrant)

    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        plain, again = gradients(ours, ours, x), gradients(ours, recomputed, x)
    assert all(map(same_bits, plain, again))


@pytest.mark.parametrize("saved", [True, False])
def test_selective_checkpointing_saves_what_policy_says(saved, monkeypatch):
    ours, x, computed = block(lora_dropout=0.5), batch(), []
    plain = gradients(ours, ours, x)
    backend = dispatch._loaded[fastlora.backend()]
    real = backend.lora_linear
    counting = lambda *a, **options: computed.append(1) or real(*a, **options)  # noqa: E731
    monkeypatch.setattr(backend, "lora_linear", counting)

    def policy(context, op, *args, **kwargs):
        wanted = saved and op is torch.ops.fastlora.lora_linear.default
        return CheckpointPolicy.MUST_SAVE if wanted else CheckpointPolicy.PREFER_RECOMPUTE

    def contexts():
        return create_selective_checkpoint_contexts(policy)

    def recomputed(x):
        return checkpoint(ours, x, use_reentrant=False, context_fn=contexts)

    assert all(map(same_bits, plain, gradients(ours, recomputed, x)))
    assert len(computed) == (6 if saved else 12)


def test_backward_twice_accumulates_gradients():
    ours, (x, other) = block(lora_dropout=0.5), (batch(), batch(2))
    once = gradients(ours, ours, x)[1:]
    torch.manual_seed(3)
    ours.zero_grad()
    total = ours(x).square().sum()
    total.backward(retain_graph=True)
    total.backward()
    trained = [p for _, p in sorted(ours.named_parameters()) if p.requires_grad]
    for parameter, single in zip(trained, once, strict=True):
        assert_near(parameter.grad, 2 * single)
    ours.eval()
    parts = [gradients(ours, ours, t)[1:] for t in (x, other)]
    ours.zero_grad()
    for t in (x, other):
        ours(t).square().sum().backward()
    for parameter, *each in zip(trained, *parts, strict=True):
        assert_near(parameter.grad, sum(each))


def test_gradients_of_some_parameters_match_unfused_torch():
    ours, x = block(), batch()
    wanted = [ours.up.lora_B, ours.q.lora_A]
    got = torch.autograd.grad(ours(x).square().sum(), wanted)
    twin = unfused_copy(ours)
    want = torch.autograd.grad(twin(x).square().sum(), [twin.up.lora_B, twin.q.lora_A])
    for a, b in zip(got, want, strict=True):
        assert_near(a, b)
    assert all(p.grad is None for p in ours.parameters())
    first = torch.autograd.grad(ours(x).square().sum(), wanted, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        first[0].square().sum().backward()


def test_saved_tensors_go_through_hooks():
    ours, x, packed = block(lora_dropout=0.5), batch(), []

    def elsewhere(x):
        with save_on_cpu():
            return ours(x)

    def copied(x):
        with saved_tensors_hooks(lambda t: packed.append(t) or t.clone(), lambda t: t):
            return ours(x)

    plain = gradients(ours, ours, x)
    for run in (elsewhere, copied):
        assert all(map(same_bits, plain, gradients(ours, run, x)))
    assert any(t is ours.q.lora_A for t in packed)


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
def test_anomaly_mode_names_the_function():
    ours, x = block(), batch()
    with torch.autograd.detect_anomaly():
        gradients(ours, ours, x)
        y = ours.q(x[0])
        with pytest.raises(RuntimeError, match="'LoRALinearBackward' returned nan"):
            y.backward(torch.full_like(y, torch.nan))


def test_module_hooks_run_without_changing_results():
    ours, x, seen = block(), batch(), []
    layer, plain = ours.q, gradients(ours, ours, x)
    layer.register_forward_pre_hook(lambda m, given: seen.append("before"))
    layer.register_forward_hook(lambda m, given, y: seen.append(tuple(y.shape)))
    layer.register_full_backward_pre_hook(lambda m, dy: seen.append(tuple(dy[0].shape)))
    layer.register_full_backward_hook(lambda m, dx, dy: seen.append(tuple(dx[0].shape)))
    assert all(map(same_bits, plain, gradients(ours, ours, x)))
    assert seen == ["before", (3, 5, 12), (3, 5, 12), (3, 5, 12)]
    layer.register_full_backward_hook(lambda m, dx, dy: (2 * dx[0],))
    assert not torch.equal(gradients(ours, ours, x)[0], plain[0])


def test_no_grad_and_inference_mode_change_nothing():
    ours, x = block(), batch()
    want = ours(x).detach()
    with torch.no_grad():
        assert same_bits(ours(x), want)
    with torch.inference_mode():
        got = ours(x)
        given = batch()
        assert got.is_inference()
    assert same_bits(got.clone(), want)
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved"):
        ours.q(given)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("nested", [False, True])
def test_autocast_of_model_equals_that_of_peft(dtype, nested):
    peft = pytest.importorskip("peft")
    from tests.support.models import TOLERANCE, error

    ours, x = block(lora_alpha=12), batch()
    base = copy.deepcopy(ours)
    for name, layer in list(base.named_children()):
        if isinstance(layer, FastLoRALinear):
            setattr(base, name, layer.to_linear())
    config = peft.LoraConfig(r=4, lora_alpha=12, target_modules=["q", "k", "v", "o", "up", "down"])
    theirs = peft.get_peft_model(base, config)
    keys = fastlora.adapter_state_dict(ours)
    peft.set_peft_model_state_dict(theirs, {n: p.detach().clone() for n, p in keys.items()})

    def run(model):
        with torch.autocast("cpu", dtype):
            if not nested:
                return model(x)
            with torch.autocast("cpu", enabled=False):
                full = model(x)
            return full + model(x)

    got, want = run(ours), run(theirs)
    assert got.dtype == want.dtype == torch.float32  # the residual's
    assert ours.q(x).dtype == torch.float32
    with torch.autocast("cpu", dtype):
        assert ours.q(x).dtype == dtype
        with torch.autocast("cpu", enabled=False):
            inner = ours.q(x)
    assert same_bits(inner, ours.q(x))
    assert error(got, want) <= TOLERANCE[dtype]
    with torch.no_grad(), theirs.disable_adapter():
        assert error(run(theirs), want) >= 2 * TOLERANCE[dtype]
    # The mean: gradients of the sum may be beyond float16, in which PEFT takes them.
    got.square().mean().backward()
    want.square().mean().backward()
    for (name, mine), other in zip(keys.items(), peft_layer(theirs, keys), strict=True):
        assert mine.grad.dtype == torch.float32, name
        # Of sums of a few rounded numbers each: half a tolerance more than the output's.
        assert error(mine.grad, other.grad) <= 1.5 * TOLERANCE[dtype], name


def peft_layer(model: nn.Module, keys) -> list[Tensor]:
    parameters = dict(model.named_parameters())
    return [parameters[key.replace(".weight", ".default.weight")] for key in keys]
