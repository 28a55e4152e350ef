"""Calls of the native library that are large, shared, refused or under inference mode."""

import ctypes

import pytest
import torch

from fastlora import functional as F
from fastlora.backends import native
from fastlora.backends.cpu import multi as cpu_multi
from fastlora.backends.values import Adapters, Rows
from fastlora.ops import dispatch
from tests.support.calls import weight_and_adapter
from tests.support.helpers import (
    same_bits,
    signed,
)

if native.unusable() is not None:
    pytest.skip(str(native.unusable()), allow_module_level=True)


CPU = torch.device("cpu")


def multi_operands(T, K, N, R, S, dtype, lora_dtype):
    x, weight = signed(T, K, dtype=dtype, device=CPU), signed(N, K, dtype=dtype, device=CPU)
    A = signed(S, R, K, dtype=lora_dtype, device=CPU)
    B = signed(S, N, R, dtype=lora_dtype, device=CPU, size=max(R, 1) ** -0.5)
    return x, weight, A, B, torch.randn(S)


def far_apart(values: torch.Tensor) -> torch.Tensor:
    """The same rows, 2^31 + 5 elements from each other; memory in between is never touched."""
    stride = 2**31 + 5
    span = (values.shape[0] - 1) * stride + values.shape[1]
    far = torch.empty(span, dtype=values.dtype).as_strided(values.shape, (stride, 1))
    return far.copy_(values)


def test_native_offsets_reach_past_2_to_the_31(instruction_set):
    """Offsets are 64-bit in x, the weight, both factors, y and h, and in merging."""
    x, W, A, B, scalings = multi_operands(2, 40, 2, 2, 2, torch.bfloat16, torch.bfloat16)
    ids = torch.tensor([1, 0])
    want = F.multi_lora_linear(x, W, A, B, ids, scalings)
    groups, y, h = F.group_rows(ids, 2), far_apart(x[:, :2] * 0), far_apart(x[:, :2] * 0)
    slots_of_rows = Rows(*groups.tensors, scalings, None, None)
    given = (far_apart(x), far_apart(W), None, far_apart(A.flatten(1)), far_apart(B.flatten(1)))
    adapters = Adapters(given[3].unflatten(1, (2, 40)), given[4].unflatten(1, (2, 2)))
    cpu_multi.run_multi(y, h, *given[:3], adapters, slots_of_rows)
    assert torch.allclose(y, want, rtol=0.02, atol=0.02)

    weight, adapter = weight_and_adapter(2, 40, 3, torch.bfloat16)
    far, near = far_apart(weight), weight.clone()
    receipt = F.merge_(far, [adapter])
    F.merge_(near, [adapter])
    assert same_bits(far.contiguous(), near)
    F.unmerge_(far, receipt)
    assert same_bits(far.contiguous(), weight)


def test_native_ops_accept_inference_tensors():
    """They have no version to count up."""
    with torch.inference_mode(), dispatch.use_backend("cpu"):
        x, W, A, B, scalings = multi_operands(3, 8, 9, 2, 2, torch.float32, torch.float32)
        y = F.multi_lora_linear(x, W, A, B, torch.tensor([0, 1, -1]), scalings)
        F.lora_add_(y, x, A[0], B[0], 0.5)
        weight = torch.zeros(9, 8)
        F.unmerge_(weight, F.merge_(weight, [(A[0], B[0], 0.5)]))
        assert not weight.any()


def test_use_refuses_unknown_instruction_set():
    before = native.instruction_set()
    with pytest.raises(ValueError, match=r"name: expected one of .*portable.*, got 'mmx'"):
        native.use("mmx")
    assert native.instruction_set() == before


def test_check_raises_for_codes_of_refusal():
    with pytest.raises(RuntimeError, match="refused its arguments"):
        native.check(native.BAD_ARGUMENT, "op")
    with pytest.raises(MemoryError, match="op: out of memory"):
        native.check(native.NO_MEMORY, "op")
    assert isinstance(native.functions(), ctypes.CDLL)


def test_expanded_operands_are_read_but_not_written(instruction_set):
    """Expanded operands are read; an expanded y and an overlapping weight are refused."""
    x, W, A, B, scalings = multi_operands(4, 64, 32, 8, 2, torch.float32, torch.float32)
    ids = torch.tensor([0, 0, 1, 1])
    same = [t[..., :1, :].expand_as(t) for t in (x, W, A, B)]
    y = F.multi_lora_linear(*same, ids, scalings)
    want = F.multi_lora_linear(*(t.contiguous() for t in same), ids, scalings)
    assert same_bits(y, want)
    with pytest.raises(ValueError, match="y: expected elements of their own"):
        F.lora_add_(torch.zeros(1, 32).expand(4, 32), x, A[0], B[0], 0.5)
    with pytest.raises(ValueError, match="weight: expected elements of their own"):
        F.merge_(torch.zeros(3000).as_strided((32, 64), (32, 1)), [(A[0], B[0], 0.5)])
