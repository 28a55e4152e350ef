"""Receipts on every backend: what is edited, misshapen or of another kernel is refused."""

import pytest
import torch

from fastlora import functional as F
from tests.support.calls import MERGED, weight_and_adapter
from tests.support.helpers import same_bits, unchanged

pytestmark = pytest.mark.usefixtures("merge_backend")


HALVES = [torch.float16, torch.bfloat16]


FLOATS = [*HALVES, torch.float32]


@pytest.mark.parametrize("dtype", FLOATS)
def test_merge_repeats_receipt_for_same_input(dtype, device):
    """Its order too, although programs take their places in it as they come."""
    plain, adapter = weight_and_adapter(300, 70, 8, dtype, device, ratio=0.3)
    results = []
    for _ in range(2):
        weight = plain.clone()
        results.append((weight, *F.merge_(weight, [adapter]).parts))
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))


def test_unmerge_refuses_receipt_of_another_kernel(device):
    weight, adapter = weight_and_adapter(20, 24, 3, torch.bfloat16, device)
    receipt = F.merge_(weight, [adapter])
    other = type(receipt)(**{**vars(receipt), "kernel": receipt.kernel + " of another compiler"})
    with unchanged(weight), pytest.raises(RuntimeError, match="snapshot=True"):
        F.unmerge_(weight, other)


@pytest.mark.parametrize("name", ["positions", "bits", "counts", "checksums"])
def test_unmerge_refuses_receipt_with_edited_part(name, device):
    weight, adapter = weight_and_adapter(20, 24, 3, torch.bfloat16, device, ratio=0.5)
    receipt = F.merge_(weight, [adapter])
    for part in (getattr(receipt, name)[:0].clone(), getattr(receipt, name) + 1):
        edited = type(receipt)(**{**vars(receipt), name: part})
        with unchanged(weight), pytest.raises(RuntimeError, match=r"receipt|weight"):
            F.unmerge_(weight, edited)


@pytest.mark.parametrize("dtype", FLOATS)
def test_snapshot_restores_without_its_kernel(dtype, device):
    weight, first = weight_and_adapter(40, 24, 3, dtype, device, ratio=0.5)
    _, second = weight_and_adapter(40, 24, 3, dtype, device, ratio=0.5)
    before = weight.clone()
    receipt = F.merge_(weight, [first], snapshot=True)
    assert receipt.nbytes >= weight.nbytes
    receipt = F.swap_(weight, receipt, [second])
    want = before.clone()
    F.merge_(want, [second])
    assert same_bits(weight, want)
    weight[3, 4] += 1
    with unchanged(weight), pytest.raises(RuntimeError, match=MERGED):
        F.unmerge_(weight, receipt)
    with unchanged(weight), pytest.raises(RuntimeError, match=MERGED):
        F.swap_(weight, receipt, [first])
    weight.copy_(want)
    F.unmerge_(weight, receipt)
    assert same_bits(weight, before)


def test_unmerge_refuses_receipt_with_misshapen_adapters(device):
    weight, adapter = weight_and_adapter(20, 24, 3, torch.bfloat16, device)
    receipt = F.merge_(weight, [adapter])
    A, B, scaling = receipt.adapters[0]
    for wrong in ((A[:, :5], B, scaling), (A, B[:5], scaling), (A[:2], B, scaling)):
        edited = type(receipt)(**{**vars(receipt), "adapters": (wrong,)})
        with unchanged(weight), pytest.raises(ValueError, match="lora_"):
            F.unmerge_(weight, edited)
    with pytest.raises(ValueError, match="snapshot: expected receipt=True"):
        F.merge_(weight, [adapter], receipt=False, snapshot=True)


def test_unmerge_refuses_edited_snapshot(device):
    weight, adapter = weight_and_adapter(20, 24, 3, torch.bfloat16, device)
    receipt = F.merge_(weight, [adapter], snapshot=True)
    adapter[1].mul_(5)  # the receipt has its own
    assert not torch.equal(receipt.adapters[0][1], adapter[1])
    receipt.snapshot[0, 0] += 1
    with unchanged(weight), pytest.raises(RuntimeError, match="receipt: it does not give back"):
        F.unmerge_(weight, receipt)
    other = type(receipt)(**{**vars(receipt), "snapshot": torch.zeros(1, device=device)})
    with unchanged(weight), pytest.raises(ValueError, match="expected a snapshot of"):
        F.unmerge_(weight, other)


def test_unmerge_notices_swapped_high_bits(device):
    """Of float32 two numbers that differ in bits 31 and 15."""
    weight, (A, B, scaling) = weight_and_adapter(20, 24, 3, torch.float32, device)
    weight[2, 3], weight[2, 5] = 1.0, -1.00390625
    receipt = F.merge_(weight, [(A, B * 0, scaling)])
    weight[2, 3], weight[2, 5] = weight[2, 5].clone(), weight[2, 3].clone()
    with unchanged(weight), pytest.raises(RuntimeError, match=MERGED):
        F.unmerge_(weight, receipt)
