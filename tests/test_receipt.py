"""The receipt of a merge: how large it is, and what it refuses to be used for."""

import math

import pytest
import torch
from torch import Tensor

from fastlora import exact
from fastlora import functional as F
from tests.calls import MERGED, weight_and_adapter
from tests.helpers import bits, same_bits, unchanged

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
def test_size_of_the_receipt(dtype, ratio, percent):
    weight, adapter = weight_and_adapter(512, 512, 8, dtype, ratio=ratio)
    receipt = F.merge_(weight, [adapter])
    held = receipt.positions.nbytes + receipt.bits.nbytes + receipt.counts.nbytes
    assert receipt.positions.dtype == torch.int16
    assert 100 * held / weight.nbytes <= 1.25 * percent
    assert receipt.nbytes == held + 16 + adapter[0].nbytes + adapter[1].nbytes


def test_the_receipt_outlives_its_adapters(device):
    weight, adapter = weight_and_adapter(33, 65, 4, torch.bfloat16, device)
    before = weight.clone()
    receipt = F.merge_(weight, [adapter])
    adapter[0].zero_()
    adapter[1].fill_(math.nan)
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


def swap_rows_of_two_tiles(weight: Tensor) -> None:
    below = exact.TILE // weight.shape[1]  # at the place in its tile that row 0 has in its own
    weight[[0, below]] = weight[[below, 0]].clone()


def swap_signs(weight: Tensor) -> None:
    """Two elements that differ in their highest bit alone change places."""
    weight[2, 3], weight[2, 4] = weight[2, 4].clone(), weight[2, 3].clone()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    "change", [edit, flip_a_bit, swap_neighbours, swap_rows_of_two_tiles, swap_signs]
)
def test_a_changed_weight_is_refused(change, dtype):
    weight, adapter = weight_and_adapter(300, 431, 3, dtype)
    weight[2, 3], weight[2, 4] = 1.0, -1.0
    adapter[0][:, 3:5] = 0
    receipt = F.merge_(weight, [adapter])
    change(weight)
    with unchanged(weight), pytest.raises(RuntimeError, match=MERGED):
        F.unmerge_(weight, receipt)


def test_another_layers_receipt_is_refused():
    weight, adapter = weight_and_adapter(65, 31, 3, torch.float32)
    other, theirs = weight_and_adapter(65, 31, 3, torch.float32)
    F.merge_(weight, [adapter])
    receipt = F.merge_(other, [theirs])
    with unchanged(weight), pytest.raises(RuntimeError, match=MERGED):
        F.unmerge_(weight, receipt)


def test_a_receipt_is_good_once():
    weight, adapter = weight_and_adapter(65, 31, 3, torch.float32)
    receipt = F.merge_(weight, [adapter])
    F.unmerge_(weight, receipt)
    with unchanged(weight), pytest.raises(RuntimeError, match=MERGED):
        F.unmerge_(weight, receipt)


def test_an_edited_receipt_is_refused():
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
def test_a_receipt_for_something_else_is_refused(others, error, message):
    weight, adapter = weight_and_adapter(65, 31, 3, torch.float32)
    receipt = F.merge_(weight, [adapter])
    receipt = type(receipt)(**{**vars(receipt), **others})
    with unchanged(weight), pytest.raises(error, match=message):
        F.unmerge_(weight, receipt)
