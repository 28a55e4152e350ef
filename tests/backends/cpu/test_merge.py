"""Merging on the native library: same bits everywhere, and never a result that is not finite."""

import dataclasses
from itertools import pairwise

import pytest
import torch

from fastlora import functional as F
from fastlora.backends import native
from fastlora.backends.cpu import merge as cpu_merge
from fastlora.ops import dispatch
from tests.support.calls import weight_and_adapter
from tests.support.helpers import same_bits

if native.unusable() is not None:
    pytest.skip(str(native.unusable()), allow_module_level=True)

SETS = native.available().split(", ")
FLOATS = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", FLOATS)
def test_merge_has_same_bits_on_every_instruction_set(dtype):
    """So that a receipt is good on another machine."""
    weight, adapter = weight_and_adapter(33, 431, 5, dtype, ratio=0.3)
    before, results = native.instruction_set(), []
    with dispatch.use_backend("cpu"):
        for name in SETS:
            native.use(name)
            try:
                merged = weight.clone()
                receipt = F.merge_(merged, [adapter])
            finally:
                native.use(before)
            results.append((merged, receipt.positions, receipt.bits, receipt.checksums))
            back = merged.clone()
            F.unmerge_(back, receipt)
            assert same_bits(back, weight)
    for one, other in pairwise(results):
        assert all(same_bits(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("where", [(0, 0), (1, 33), (3, 69)], ids=["first", "middle", "last"])
@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
@pytest.mark.parametrize("value", [0x7FFFFFFF, 0x7FC00000, 0x7F800000])  # NaN of CUDA's and ours
@pytest.mark.parametrize("dtype", FLOATS)
def test_merge_refuses_adapter_that_is_not_finite(dtype, value, factor, where, instruction_set):
    """With a receipt and without, wherever it stands; an infinity beside zeros is NaN as well."""
    weight, (A, B, scaling) = weight_and_adapter(40, 70, 4, dtype, lora_dtype=torch.float32)
    bad = torch.tensor(value, dtype=torch.int32).view(torch.float32)
    if factor == "lora_A":
        A[where] = bad
    else:
        B[min(where[1], 39), where[0]] = bad
    before = weight.clone()
    for receipt in (True, False):
        with pytest.raises(ValueError, match="not finite"):
            F.merge_(weight, [(A, B, scaling)], receipt=receipt)
        assert same_bits(weight, before)


def test_receipt_ignores_flush_denormal_of_thread(instruction_set):
    """Flushing of denormals, which torch can switch on for a thread, is off while merging."""
    tiny = 1e-37 * torch.randn(20, 70)
    A, B = torch.randn(3, 70) * 1e-19, torch.randn(20, 3) * 1e-19
    merged = tiny.clone()
    assert torch.set_flush_denormal(True)
    try:
        receipt = F.merge_(merged, [(A, B, 0.5)])
    finally:
        torch.set_flush_denormal(False)
    F.unmerge_(merged, receipt)
    assert same_bits(merged, tiny)


def weights_with_adapters():
    """(weight, adapters): whole blocks and parts of them, ordinary and tiny values."""
    for dtype in FLOATS:
        for size in (1.0, 1e-37):
            weight, (A, B, _) = weight_and_adapter(83, 200, 5, dtype, ratio=0.3)
            yield weight * size, [(A, B * size, 0.1)]
        weight, adapter = weight_and_adapter(83, 200, 5, dtype, ratio=0.3)
        yield weight.T.contiguous().T, [adapter, weight_and_adapter(83, 200, 2, dtype)[1]]


@pytest.mark.parametrize("name", SETS)
def test_merge_without_receipt_has_same_bits(name):
    before = native.instruction_set()
    native.use(name)
    try:
        with dispatch.use_backend("cpu"):
            for weight, adapters in weights_with_adapters():
                with_receipt, for_good = weight.clone(), weight.clone()
                assert for_good.stride() == weight.stride()
                F.merge_(with_receipt, adapters)
                assert F.merge_(for_good, adapters, receipt=False) is None
                assert not same_bits(for_good, weight)
                assert same_bits(for_good, with_receipt), (weight.dtype, adapters[0][2])
    finally:
        native.use(before)


@pytest.mark.parametrize("place", [(0, 0), (9, 64), (20, 199), (41, 130), (81, 7), (82, 199)])
def test_merge_without_receipt_checks_before_writing(place):
    for dtype in FLOATS:
        largest = torch.finfo(dtype).max
        weight = torch.randn(83, 200).to(dtype)
        weight[place] = largest
        before = weight.clone()
        A, B = torch.full((1, 200), 1.0), torch.full((83, 1), largest / 8)
        with dispatch.use_backend("cpu"), pytest.raises(ValueError, match="not finite"):
            F.merge_(weight, [(A, B, 1.0)], receipt=False)
        assert same_bits(weight, before)


def test_merge_failing_at_its_receipt_is_undone(monkeypatch):
    weight, adapter = weight_and_adapter(83, 200, 5, torch.bfloat16, ratio=0.3)
    before = weight.clone()

    def out_of_memory(*_, **__):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(torch, "empty", out_of_memory)
    with dispatch.use_backend("cpu"), pytest.raises(torch.OutOfMemoryError):
        F.merge_(weight, [adapter])
    assert same_bits(weight, before)


def test_merge_interrupted_after_its_receipt_is_undone(monkeypatch):
    weight, adapter = weight_and_adapter(83, 200, 5, torch.bfloat16, ratio=0.3)
    before = weight.clone()

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cpu_merge, "mark_written", interrupted)
    with dispatch.use_backend("cpu"), pytest.raises(KeyboardInterrupt):
        F.merge_(weight, [adapter])
    assert same_bits(weight, before)


def test_unmerge_refuses_receipt_of_other_lengths():
    weight, adapter = weight_and_adapter(300, 431, 3, torch.bfloat16, ratio=0.3)
    with dispatch.use_backend("cpu"):
        receipt = F.merge_(weight, [adapter])
        merged = weight.clone()
        for name in ("positions", "bits", "counts", "checksums"):
            short = getattr(receipt, name)[:1].clone()
            with pytest.raises(RuntimeError, match="receipt: it does not give back"):
                F.unmerge_(weight, dataclasses.replace(receipt, **{name: short}))
            assert same_bits(weight, merged)
