"""The receipt of a merge: its size, and what it refuses to be used for."""

import math

import pytest
import torch
from torch import Tensor

from fastlora import functional as F
from fastlora.backends.torch import merge as exact
from tests.support.calls import MERGED, weight_and_adapter
from tests.support.helpers import bits, same_bits, unchanged

# Rows of a tile of the Triton kernels.
TRITON_ROWS = 128
SIGNALLING = {
    torch.float16: 0x7D01,
    torch.bfloat16: 0x7FA1,
    torch.float32: 0x7FA00001,
    torch.float64: 0x7FF4000000000001,
}
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


# The share of elements whose sum with d crosses a binade, as bytes of the weight.
@pytest.mark.parametrize(
    "dtype, ratio, percent",
    [
        (torch.bfloat16, 1e-3, 0.4),
        (torch.bfloat16, 1e-2, 2.6),
        (torch.bfloat16, 1e-1, 15),
        (torch.float32, 1e-3, 0.5),
        (torch.float32, 1e-2, 3.6),
        (torch.float32, 1e-1, 17),
    ],
)
def test_receipt_size_stays_near_documented_percentage(
    dtype, ratio, percent, merge_backend, device
):
    # Interpreted kernels take their time.
    N = 256 if merge_backend == "triton" and device.type == "cpu" else 512
    weight, adapter = weight_and_adapter(N, N, 8, dtype, device, ratio=ratio)
    receipt = F.merge_(weight, [adapter])
    held = receipt.positions.nbytes + receipt.bits.nbytes + receipt.counts.nbytes
    assert receipt.positions.dtype == torch.int16
    assert 100 * held / weight.nbytes <= 1.25 * percent
    # Two checksums of the weight, or of each tile.
    tiles = receipt.counts.numel() if merge_backend in ("triton", "cuda") else 1
    assert receipt.checksums.nbytes == 16 * tiles
    assert receipt.nbytes == held + 16 * tiles + adapter[0].nbytes + adapter[1].nbytes


def test_receipt_unmerges_after_adapters_have_changed(device):
    weight, adapter = weight_and_adapter(33, 65, 4, torch.bfloat16, device)
    before = weight.clone()
    receipt = F.merge_(weight, [adapter])
    adapter[0].zero_()
    adapter[1].fill_(math.nan)
    F.unmerge_(weight, receipt)
    assert same_bits(weight, before)


@pytest.mark.parametrize("dtype", FLOATS)
def test_unmerge_restores_special_values(dtype, merge_backend, device):
    """Zeros of both signs, denormals, infinities, NaN of any payload, the largest numbers."""
    weight, adapter = weight_and_adapter(8, 64, 3, dtype, device)
    info = torch.finfo(dtype)
    special = [
        0.0,
        -0.0,
        info.tiny / 4,
        -info.tiny / 4,
        math.inf,
        -math.inf,
        math.nan,
        info.max / 2,
    ]
    weight[:, :8] = torch.tensor(special, dtype=dtype, device=device)
    weight[:, 32:40] = weight[:, :8]
    payload = bits(weight)
    payload[0, 6] += 1
    payload[1, 6] |= 1 << (8 * weight.itemsize - 1) if weight.itemsize < 8 else 1
    payload[2, 6] = SIGNALLING[dtype]
    weight.view(payload.dtype).copy_(payload)
    adapter[0][:, 32:] = 0  # d = 0 there, so -0 becomes 0
    before = weight.clone()
    receipt = F.merge_(weight, [adapter])
    odd = ~before.isfinite()
    assert bool((weight.isnan() == before.isnan())[odd].all())
    assert bool((weight.isinf() == before.isinf()).all())
    F.unmerge_(weight, receipt)
    assert same_bits(weight, before)


def edit(weight: Tensor) -> None:
    weight[-1, -1] += 1


def flip_a_bit(weight: Tensor) -> None:
    raw = bits(weight)
    raw[3, 5] ^= 1
    weight.copy_(raw.view(weight.dtype))


def swap_neighbours(weight: Tensor) -> None:
    weight[2, 3:5] = weight[2, 3:5].flip(0).clone()


def swap_rows(weight: Tensor) -> None:
    weight[:2] = weight[:2].flip(0).clone()


def swap_rows_of_two_tiles(weight: Tensor) -> None:
    """Each at the place in its tile that the other has in its own."""
    below = TRITON_ROWS if weight.shape[1] < 64 else exact.TILE // weight.shape[1]
    weight[[0, below]] = weight[[below, 0]].clone()


def swap_signs(weight: Tensor) -> None:
    """Two elements that differ in their highest bit alone change places."""
    weight[2, 3], weight[2, 4] = weight[2, 4].clone(), weight[2, 3].clone()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    "change", [edit, flip_a_bit, swap_neighbours, swap_rows, swap_rows_of_two_tiles, swap_signs]
)
def test_unmerge_refuses_weight_changed_since_merging(change, dtype, merge_backend, device):
    N, K = (150, 40) if merge_backend == "triton" else (300, 431)
    weight, adapter = weight_and_adapter(N, K, 3, dtype, device)
    weight[2, 3], weight[2, 4] = 1.0, -1.0
    adapter[0][:, 3:5] = 0
    receipt = F.merge_(weight, [adapter])
    change(weight)
    with unchanged(weight), pytest.raises(RuntimeError, match=MERGED):
        F.unmerge_(weight, receipt)


def test_unmerge_refuses_receipt_of_another_layer():
    weight, adapter = weight_and_adapter(65, 31, 3, torch.float32)
    other, theirs = weight_and_adapter(65, 31, 3, torch.float32)
    F.merge_(weight, [adapter])
    receipt = F.merge_(other, [theirs])
    with unchanged(weight), pytest.raises(RuntimeError, match=MERGED):
        F.unmerge_(weight, receipt)


def test_unmerge_refuses_receipt_used_before():
    weight, adapter = weight_and_adapter(65, 31, 3, torch.float32)
    receipt = F.merge_(weight, [adapter])
    F.unmerge_(weight, receipt)
    with unchanged(weight), pytest.raises(RuntimeError, match=MERGED):
        F.unmerge_(weight, receipt)


def test_unmerge_refuses_receipt_with_edited_adapter():
    weight, adapter = weight_and_adapter(65, 31, 3, torch.float32)
    receipt = F.merge_(weight, [adapter])
    receipt.adapters[0][0][0] += 1e-3
    with unchanged(weight), pytest.raises(RuntimeError, match="receipt: it does not give back"):
        F.unmerge_(weight, receipt)


@pytest.mark.parametrize(
    "others, error, message",
    [
        ({"dtype": torch.float16}, TypeError, "weight: the receipt is for torch.float16"),
        ({"shape": (31, 65)}, ValueError, r"weight: the receipt is for shape \(31, 65\)"),
        ({"kernel": "another"}, RuntimeError, "receipt: made by kernel 'another', "),
    ],
)
def test_unmerge_refuses_receipt_for_other_weight_kind(others, error, message):
    weight, adapter = weight_and_adapter(65, 31, 3, torch.float32)
    receipt = F.merge_(weight, [adapter])
    receipt = type(receipt)(**{**vars(receipt), **others})
    with unchanged(weight), pytest.raises(error, match=message):
        F.unmerge_(weight, receipt)
