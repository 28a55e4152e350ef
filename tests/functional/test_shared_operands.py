"""Operands that share memory, that autograd guards, or whose scale is unusual."""

from __future__ import annotations

import pytest
import torch

import fastlora
from fastlora import FastLoRALinear, MultiLoRALinear
from fastlora import functional as F
from tests.support import oracle
from tests.support.helpers import same_bits


def leaf_adapter(N: int, K: int, R: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(R, K, requires_grad=True), torch.randn(N, R, requires_grad=True)


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("shared", ["same", "overlapping"])
def test_gradients_are_right_when_x_overlaps_y(shared, many):
    """Backward needs x as it was, which adding onto y has overwritten."""
    lora_A, lora_B = leaf_adapter(5, 5, 3)
    buffer = torch.randn(4, 7)
    y, x = (buffer[:, :5], buffer[:, :5]) if shared == "same" else (buffer[:, 2:], buffer[:, :5])
    kept_y, kept_x = y.clone(), x.clone()
    if many:
        ids, scalings = torch.zeros(4, dtype=torch.int64), torch.ones(1)
        F.multi_lora_add_(y, x, lora_A[None], lora_B[None], ids, scalings).square().sum().backward()
    else:
        F.lora_add_(y, x, lora_A, lora_B, 1.0).square().sum().backward()
    got = lora_A.grad, lora_B.grad
    lora_A.grad = lora_B.grad = None
    (kept_y + kept_x @ lora_A.T @ lora_B.T).square().sum().backward()
    for ours, theirs in zip(got, (lora_A.grad, lora_B.grad), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4)  # fp32, another order


@pytest.mark.parametrize("shift", [0, 5])
def test_values_are_right_when_x_overlaps_y(shift, device, backend):
    """Wider than a tile: no part of x may be written before all of it is read."""
    lora_A, lora_B = (t.detach().to(device) for t in leaf_adapter(300, 300, 3))
    buffer = torch.randn(8, 320, device=device)
    y, x = buffer[:, shift : 300 + shift], buffer[:, :300]
    want = y.double() + x.double() @ lora_A.double().T @ lora_B.double().T
    with torch.no_grad():
        F.lora_add_(y, x, lora_A, lora_B, 1.0)
    assert oracle.relative_error(y, want) < 1e-5


@pytest.mark.parametrize(
    "make",
    [
        lambda: (torch.randn(4, 15, requires_grad=True) * 1).chunk(3, -1)[1],
        lambda: torch.randn(4, 5, requires_grad=True)[:, :],
    ],
    ids=["chunk", "view of a leaf"],
)
def test_y_guarded_by_autograd_is_refused_unwritten(make):
    y = make()
    before = y.detach().clone()
    with pytest.raises(RuntimeError, match=r"^y: expected"):
        F.lora_add_(y, torch.randn(4, 6), *leaf_adapter(5, 6, 2), 1.0)
    assert same_bits(y.detach(), before)


@pytest.mark.parametrize("name", ["scalings", "row_scales"])
def test_scalings_that_require_grad_are_refused(name):
    lora_A, lora_B = leaf_adapter(5, 6, 2)
    given = {"scalings": torch.ones(1), "row_scales": torch.ones(4)}
    given[name].requires_grad_()
    ids, scalings = torch.zeros(4, dtype=torch.int64), given["scalings"]
    operands = (torch.randn(4, 6), torch.randn(5, 6), lora_A[None], lora_B[None], ids, scalings)
    with pytest.raises(ValueError, match=f"^{name}: "):
        F.multi_lora_linear(*operands, row_scales=given["row_scales"])


def test_scaling_does_not_overflow_half_precision():
    """h = 4e4 is near fp16's largest number; twice that only exists inside the product."""
    x, lora_A = (torch.full((1, 4), 100.0, dtype=torch.float16) for _ in range(2))
    lora_B, weight = torch.full((2, 1), 1e-4).half(), torch.zeros(2, 4).half()
    one = F.lora_linear(x, weight, lora_A, lora_B.requires_grad_(), 2.0)
    ids = torch.zeros(1, dtype=torch.int64)
    many = F.multi_lora_linear(x, weight, lora_A[None], lora_B[None], ids, torch.tensor([2.0]))
    one.backward(torch.full_like(one, 2e-3))
    assert one.tolist() == many.tolist() == [[8.0, 8.0]]
    assert lora_B.grad.flatten().tolist() == pytest.approx([160.0, 160.0], rel=2e-3)  # fp16


@pytest.mark.parametrize("factor", [1e2, 1e4, 1e8])
def test_merge_is_accurate_for_unbalanced_factors(factor):
    lora_A, lora_B = torch.randn(16, 300), torch.randn(200, 16)
    lora_A[0] *= factor
    lora_B[:, 0] /= factor
    weight = torch.zeros(200, 300)
    F.merge_(weight, [(lora_A, lora_B, 1.0)])
    want = oracle.merge(torch.zeros(200, 300), [(lora_A, lora_B, 1.0)])
    assert oracle.relative_error(weight, want) < 1e-6  # the numerics contract's fp32 constant


def test_merge_failing_at_its_receipt_changes_nothing(monkeypatch):
    weight = torch.randn(300, 431)
    before = weight.clone()

    def out_of_memory(*_, **__):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(torch, "cat", out_of_memory)
    with fastlora.use_backend("torch"), pytest.raises(torch.OutOfMemoryError):
        F.merge_(weight, [(torch.randn(2, 431), torch.randn(300, 2), 1.0)])
    assert same_bits(weight, before)


@pytest.mark.parametrize(
    "slot, lora_A, lora_B, scaling, message",
    [
        (-1, (2, 6), (5, 2), 1.0, "slot: expected one of 0 to 2, got -1"),
        (3, (2, 6), (5, 2), 1.0, "slot: expected"),
        (0, (9, 6), (5, 9), 1.0, "r at most 4"),
        (0, (2, 6), (5, 1), 1.0, "lora_B: expected shape"),
        (0, (1, 1), (5, 1), 1.0, "lora_A: expected shape"),
        (0, (2, 6), (5, 2), float("nan"), "scaling: expected a finite number"),
    ],
)
def test_set_adapter_refuses_shapes_that_do_not_fit(slot, lora_A, lora_B, scaling, message):
    layer = MultiLoRALinear.from_linear(torch.nn.Linear(6, 5), max_adapters=3, max_rank=4)
    layer.set_adapter(0, torch.randn(2, 6), torch.randn(5, 2), 0.5)
    before = {name: t.clone() for name, t in layer.named_buffers()}
    with pytest.raises(ValueError, match=message):
        layer.set_adapter(slot, torch.randn(lora_A), torch.randn(lora_B), scaling)
    assert all(same_bits(t, before[name]) for name, t in layer.named_buffers())


def test_layer_output_of_two_dimensions_is_no_view():
    """As an nn.Linear's: in-place operations after it need no detour through its base."""
    x = torch.randn(3, 6, requires_grad=True)
    assert FastLoRALinear(6, 5)(x)._base is None
