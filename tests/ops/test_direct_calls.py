"""Ops skip torch's dispatcher only where nothing can observe it."""

from __future__ import annotations

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastlora import functional as F
from fastlora.ops.call import call as call_op
from tests.support.helpers import same_bits


def operands():
    return torch.randn(3, 8), torch.randn(5, 8), torch.randn(2, 8), torch.randn(5, 2)


def call(x, weight, lora_A, lora_B):
    return F.lora_linear(x, weight, lora_A, lora_B, 0.5)


@pytest.fixture
def names_of_dispatched_ops(monkeypatch):
    """The names of the ops that went through torch's dispatcher, as a list that grows."""
    seen = []

    class Namespace:
        def __getattr__(self, name):
            seen.append(name)
            return getattr(real, name)

    real = torch.ops.fastlora
    monkeypatch.setattr(torch.ops, "fastlora", Namespace())
    return seen


def test_op_skips_dispatcher_for_plain_tensors(names_of_dispatched_ops):
    given = operands()
    expected = torch.ops.fastlora.lora_linear(
        given[0], given[1], None, *given[2:], None, 0.5, 0.0, None, False, "torch"
    )[0]
    names_of_dispatched_ops.clear()
    torch.testing.assert_close(call(*given), expected)
    parameter = torch.nn.Parameter(given[1])
    with torch.no_grad():
        call(given[0], parameter, *given[2:])
    assert names_of_dispatched_ops == []


def test_forward_and_backward_skip_dispatcher_in_training(names_of_dispatched_ops):
    x, weight, lora_A, lora_B = operands()
    call(x, weight, lora_A.requires_grad_(), lora_B).sum().backward()
    assert lora_A.grad is not None
    assert names_of_dispatched_ops == []


class Seen(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class SeenFunction(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [Seen, SeenFunction])
def test_torch_modes_see_the_op(mode):
    seen = mode()
    seen.names = []
    with seen:
        call(*operands())
    assert any("fastlora.lora_linear" in name for name in seen.names)


def test_profiler_lists_the_op():
    with torch.profiler.profile() as profile:
        call(*operands())
    assert "fastlora::lora_linear" in {event.key for event in profile.key_averages()}


@pytest.mark.filterwarnings("ignore:.*jit.trace:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_jit_trace_holds_the_op():
    given = operands()
    traced = torch.jit.trace(lambda x: call(x, *given[1:]), given[0])
    assert "fastlora::differentiable_lora_linear" in str(traced.graph)
    x = torch.randn(3, 8)
    torch.testing.assert_close(traced(x), call(x, *given[1:]))


class PlainSubclass(torch.Tensor):
    pass


def test_tensor_subclasses_go_through_dispatcher(names_of_dispatched_ops):
    x, *rest = operands()
    y = call(x.as_subclass(PlainSubclass), *rest)
    assert type(y) is PlainSubclass
    assert "lora_linear" in names_of_dispatched_ops


def test_meta_and_zero_tensors_go_through_dispatcher(names_of_dispatched_ops):
    meta = [t.to("meta") for t in operands()]
    assert call(*meta).is_meta
    _, *rest = operands()
    zero = torch._efficientzerotensor((3, 8))
    assert not call(zero, *rest).any()
    assert "lora_linear" in names_of_dispatched_ops


def test_lazily_negated_tensor_is_negated_first(names_of_dispatched_ops):
    x, *rest = operands()
    late = torch._neg_view(x)
    assert late.is_neg()
    assert same_bits(call(late, *rest), call(-x, *rest))
    assert "lora_linear" in names_of_dispatched_ops


def test_fake_tensors_give_a_fake_result(names_of_dispatched_ops):
    with torch._subclasses.FakeTensorMode() as mode:
        given = [mode.from_tensor(t) for t in operands()]
    # Outside of its mode as well.
    y = call_op(
        "lora_linear", given[0], given[1], None, *given[2:], None, 0.5, 0.0, None, False, "torch"
    )[0]
    assert type(y).__name__ == "FakeTensor"
    assert "lora_linear" in names_of_dispatched_ops
