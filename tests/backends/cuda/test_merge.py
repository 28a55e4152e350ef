"""Merging on the CUDA kernels: what tests of all merging backends do not cover."""

import pytest
import torch

from fastlora import functional as F
from fastlora.backends import native
from fastlora.backends.merge_lists.operands import split_receipts
from tests.support import cuda_host
from tests.support.calls import assert_one_rounding, weight_and_adapter
from tests.support.helpers import misaligned, same_bits, transposed

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
pytestmark = pytest.mark.usefixtures("on_cuda_kernels", "memory_holds_nan")


@pytest.mark.parametrize("lora_dtype", [torch.float32, None], ids=["fp32", "same"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N, K, R", [(63, 431, 5), (130, 136, 100), (1, 2049, 3), (2049, 8, 16)])
def test_merge_rounds_once_and_unmerge_restores(N, K, R, dtype, lora_dtype, device):
    """Ranks beyond what shared memory holds at a time, parts of tiles, one row."""
    weight, adapter = weight_and_adapter(N, K, R, dtype, device, lora_dtype=lora_dtype or dtype)
    before = weight.clone()
    receipt = F.merge_(weight, [adapter])
    assert receipt.kernel.startswith("cuda-merge-1 ")
    assert_one_rounding(weight, before, [adapter])
    F.unmerge_(weight, receipt)
    assert same_bits(weight, before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_merge_has_same_bits_in_any_layout(dtype, device):
    """By chunks or one by one; factors aligned or not."""
    weight, (A, B, s) = weight_and_adapter(136, 200, 16, dtype, device, lora_dtype=dtype)
    found = []
    for layout in (torch.clone, misaligned, transposed):
        own = layout(weight)
        receipt = F.merge_(own, [(layout(A), layout(B), s)])
        found.append((own.clone(), receipt.counts, receipt.checksums))
        F.unmerge_(own, receipt)
        assert same_bits(own, weight)
    for other in found[1:]:
        assert same_bits(other[0].contiguous(), found[0][0].contiguous())
        assert all(torch.equal(a, b) for a, b in zip(other[1:], found[0][1:], strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_receipts_are_same_in_any_thread_order(dtype):
    """A tile's place in the pool differs with the order of the blocks; the receipt does not."""
    if not native.cuda_on_host():
        pytest.skip("a GPU has an order of its own")
    cpu = torch.device("cpu")
    weight, old = weight_and_adapter(200, 136, 16, dtype, cpu, lora_dtype=dtype)
    new = weight_and_adapter(200, 136, 8, dtype, cpu)[1]

    def once():
        own = weight.clone()
        first = F.merge_(own, [old])
        second = F.swap_(own, first, [new])
        merged = own.clone()
        F.unmerge_(own, second)
        assert same_bits(own, weight)
        return merged, *first.parts, *second.parts

    want = once()
    for seed in cuda_host.ORDERS:
        with cuda_host.order(native.cuda_functions(), seed):
            assert all(torch.equal(a, b) for a, b in zip(once(), want, strict=True))


def test_float32_merge_has_bits_of_cpu_library(device):
    """Multiplied and added one by one, in the order of the ranks, on every machine."""
    if native.unusable() is not None:
        pytest.skip(str(native.unusable()))
    weight, (A, B, _) = weight_and_adapter(70, 136, 16, torch.float32, device)
    here, there = weight.clone(), weight.cpu()
    F.merge_(here, [(A, B, 1.0)], receipt=False)
    made = torch.ops.fastlora.merge_([there], [A.cpu()], [B.cpu()], [1.0], [1], False, "cpu")
    assert len(split_receipts(made)) == 1
    assert same_bits(here.cpu(), there)
