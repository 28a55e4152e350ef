"""Merging on every backend: many weights at once, exactly undone."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from fastlora import functional as F
from fastlora.backends.merge_lists.operands import flatten_receipts
from tests.support.calls import MERGED, assert_one_rounding, weight_and_adapter
from tests.support.helpers import LAYOUTS, misaligned, same_bits, strided, transposed, unchanged

pytestmark = pytest.mark.usefixtures("merge_backend")

HALVES = [torch.float16, torch.bfloat16]
FLOATS = [*HALVES, torch.float32]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("lora_dtype", FLOATS)
@pytest.mark.parametrize(
    "N, K, R", [(1, 1, 1), (63, 130, 16), (130, 63, 3), (129, 72, 40), (9, 5, 0)]
)
def test_merge_rounds_once_and_unmerge_restores(N, K, R, dtype, lora_dtype, device):
    weight, adapter = weight_and_adapter(N, K, R, dtype, device, lora_dtype=lora_dtype)
    before, address = weight.clone(), weight.data_ptr()
    with unchanged(adapter):
        receipt = F.merge_(weight, [adapter])
        assert_one_rounding(weight, before, [adapter])
        merged = weight.clone()
        F.unmerge_(weight, receipt)
        assert same_bits(weight, before)
        F.merge_(weight, [adapter], receipt=False)
        assert same_bits(weight, merged)
    assert weight.data_ptr() == address


@pytest.mark.parametrize("dtype", FLOATS)
def test_merge_sums_several_adapters_before_rounding(dtype, device):
    weight, first = weight_and_adapter(30, 70, 9, dtype, device, ratio=0.5)
    _, second = weight_and_adapter(30, 70, 2, dtype, device, ratio=0.5, lora_dtype=torch.float16)
    _, third = weight_and_adapter(30, 70, 20, dtype, device, ratio=0.5, lora_dtype=torch.float32)
    adapters, before = [first, second, third], weight.clone()
    receipt = F.merge_(weight, adapters)
    assert_one_rounding(weight, before, adapters)
    F.unmerge_(weight, receipt)
    assert same_bits(weight, before)


@pytest.mark.parametrize("dtype", FLOATS)
def test_merge_accepts_nan_where_weight_is_nan(dtype, device):
    """Where the weight is NaN an adapter may be: nothing is lost, and beside it nothing spoiled."""
    weight, (A, B, scaling) = weight_and_adapter(7, 70, 5, dtype, device)
    weight[3], B[3, 1] = math.nan, math.nan
    before = weight.clone()
    receipt = F.merge_(weight, [(A, B, scaling)])
    assert torch.equal(weight.isnan(), before.isnan())
    F.unmerge_(weight, receipt)
    assert same_bits(weight, before)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_merge_has_same_bits_for_any_strides(layout, dtype, device):
    """Same bits whatever the layout; what lies between the elements is not touched."""
    plain, adapter = weight_and_adapter(40, 136, 8, dtype, device)
    weight = layout(plain)
    size = weight.untyped_storage().nbytes() // weight.itemsize
    around = torch.as_strided(weight, (size,), (1,), 0)
    outside = around.clone()
    receipt = F.merge_(weight, [tuple(layout(t) for t in adapter[:2]) + adapter[2:]])
    merged = weight.clone()
    F.merge_(plain, [adapter], receipt=False)
    assert same_bits(merged, plain)
    F.unmerge_(weight, receipt)
    assert same_bits(around, outside)


def several_weights(device, dtypes=FLOATS) -> tuple[list[Tensor], list[list]]:
    """Weights of other shapes, dtypes and layouts, with no, one and two adapters."""
    weights, adapters = [], []
    for i, dtype in enumerate(dtypes):
        for layout in (misaligned, transposed, strided):
            N, K = 20 + 70 * (i == 1), 24 + 50 * (i == 2)
            weight, first = weight_and_adapter(N, K, 8, dtype, device)
            _, second = weight_and_adapter(N, K, 3, dtype, device, lora_dtype=torch.float16)
            weights.append(layout(weight))
            adapters.append([[first], [first, second], []][len(weights) % 3])
    return weights, adapters


def test_foreach_merge_has_bits_of_each_alone(device):
    weights, adapters = several_weights(device)
    alone = [w.clone() for w in weights]
    for weight, own in zip(alone, adapters, strict=True):
        F.merge_(weight, own, receipt=False)
    with unchanged(weights):
        receipts = F.foreach_merge_(weights, adapters)
        assert all(same_bits(a, b) for a, b in zip(weights, alone, strict=True))
        back = list(range(len(weights)))[::-1]
        F.foreach_unmerge_([weights[i] for i in back], [receipts[i] for i in back])
    assert F.foreach_merge_(weights, adapters, receipt=False) == [None] * len(weights)
    assert all(same_bits(a, b) for a, b in zip(weights, alone, strict=True))
    F.foreach_merge_([], [])


@pytest.mark.parametrize("bad", [0, 4, 8])
@pytest.mark.parametrize("receipt", [True, False])
def test_foreach_merge_with_one_non_finite_changes_nothing(bad, receipt, device):
    weights, adapters = several_weights(device)
    A, B = torch.ones(1, weights[bad].shape[1]), torch.zeros(weights[bad].shape[0], 1)
    B[-1] = math.nan
    adapters[bad] = [(A.to(device), B.to(device), 1.0)]
    with (
        unchanged(weights),
        pytest.raises(ValueError, match=rf"weights\[{bad}\]: .*finite") as info,
    ):
        F.foreach_merge_(weights, adapters, receipt=receipt)
    assert info.value.index == bad


def test_batch_of_one_kind_merges_all_or_none(device):
    """All in one call of a backend, for good: what was written before it is had back."""
    weights, adapters = several_weights(device, [torch.bfloat16])
    adapters[2] = [(torch.ones(1, 24), torch.full((20, 1), math.inf), 1.0)]
    adapters[2] = [(*(t.to(device) for t in adapters[2][0][:2]), 1.0)]
    with unchanged(weights), pytest.raises(ValueError, match=r"weights\[2\]: .*finite"):
        F.foreach_merge_(weights, adapters, receipt=False)


@pytest.mark.parametrize("step", ["merge", "merge for good", "unmerge", "swap"])
def test_op_names_failing_weight_and_changes_none(step, device, merge_backend):
    """In one call of the backend's op, which says which weight failed and changes none."""
    pairs = [weight_and_adapter(20, 24, 3, torch.bfloat16, device) for _ in range(5)]
    weights = [weight for weight, _ in pairs]
    A, B, scalings = (list(part) for part in zip(*(pair[1] for pair in pairs), strict=True))
    infinite = [b.clone() for b in B]
    infinite[2][3, 1] = math.inf
    op, counts = torch.ops.fastlora, [1] * 5
    bad = (A, infinite, scalings, counts)
    if step in ("unmerge", "swap"):
        made = op.merge_(weights, A, B, scalings, counts, True, merge_backend)
        old = (A, B, scalings, counts, flatten_receipts(made))
    if step == "unmerge":
        weights[2][4, 5] += 1
    act = {
        "merge": lambda: op.merge_(weights, *bad, True, merge_backend),
        "merge for good": lambda: op.merge_(weights, *bad, False, merge_backend),
        "unmerge": lambda: op.unmerge_(weights, *old, merge_backend),
        "swap": lambda: op.swap_(weights, *old, *bad, merge_backend),
    }[step]
    error = RuntimeError if step == "unmerge" else ValueError
    with unchanged(weights, B, infinite), pytest.raises(error) as info:
        act()
    assert info.value.index == 2


@pytest.mark.parametrize("bad", [0, 4, 8])
def test_foreach_refuses_all_when_one_was_edited(bad, device):
    weights, adapters = several_weights(device)
    receipts = F.foreach_merge_(weights, adapters)
    weights[bad][-1, -1] += 1
    others = [[(A.flip(0), B.flip(1), s) for A, B, s in some] for some in adapters]
    message = rf"weights\[{bad}\]: .*{MERGED}"
    with unchanged(weights), pytest.raises(RuntimeError, match=message):
        F.foreach_unmerge_(weights, receipts)
    with unchanged(weights), pytest.raises(RuntimeError, match=message):
        F.foreach_swap_(weights, receipts, others)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("ratio", [0.01, 1.0])
def test_swap_has_bits_of_unmerging_and_merging(dtype, ratio, device):
    weight, first = weight_and_adapter(70, 72, 8, dtype, device, ratio)
    _, second = weight_and_adapter(70, 72, 3, dtype, device, ratio, lora_dtype=torch.bfloat16)
    before, want = weight.clone(), weight.clone()
    F.merge_(want, [second, first])
    receipt = F.merge_(weight, [first])
    receipt = F.swap_(weight, receipt, [second, first])
    assert same_bits(weight, want)
    assert len(receipt.adapters) == 2
    receipt = F.swap_(weight, receipt, [])
    assert same_bits(weight, before)
    F.unmerge_(weight, receipt)
    assert same_bits(weight, before)


def test_swap_to_non_finite_adapter_changes_nothing(device):
    weights, adapters = several_weights(device)
    receipts = F.foreach_merge_(weights, adapters)
    others = [list(some) for some in adapters]
    A, B, scaling = weight_and_adapter(*weights[5].shape, 2, torch.float32, device)[1]
    B[3, 1] = math.inf
    others[5] = [(A, B, scaling)]
    with unchanged(weights), pytest.raises(ValueError, match=r"weights\[5\]: .*finite"):
        F.foreach_swap_(weights, receipts, others)
    F.foreach_unmerge_(weights, receipts)


def test_unmerge_writes_nothing_outside_its_weight(device):
    """Whatever its positions say."""
    around = torch.randn(4000, 24, device=device).bfloat16()
    weight = around[1000:1020]
    _, adapter = weight_and_adapter(20, 24, 3, torch.bfloat16, device, ratio=0.5)
    receipt = F.merge_(weight, [adapter])
    edited = type(receipt)(**{**vars(receipt), "positions": torch.full_like(receipt.positions, -1)})
    with unchanged(around), pytest.raises(RuntimeError, match="receipt"):
        F.unmerge_(weight, edited)


def test_foreach_merge_accepts_slices_of_one_tensor(device):
    """q, k and v of one tensor, by rows and by columns: they share memory and no element."""
    for dim in (0, 1):
        packed, _ = weight_and_adapter(48, 48, 1, torch.bfloat16, device)
        before, slices = packed.clone(), list(packed.split([16, 24, 8], dim))
        adapters = [[weight_and_adapter(*w.shape, 4, w.dtype, device)[1]] for w in slices]
        receipts = F.foreach_merge_(slices, adapters)
        for weight, own, old in zip(slices, adapters, before.split([16, 24, 8], dim), strict=True):
            assert_one_rounding(weight, old, own)
        F.foreach_unmerge_(slices, receipts)
        assert same_bits(packed, before)
        overlapping = [packed.narrow(dim, 0, 20), packed.narrow(dim, 16, 20)]
        none = [[], []]
        with unchanged(packed), pytest.raises(ValueError, match=r"weights\[1\]: .*weights\[0\]"):
            F.foreach_merge_(overlapping, none)


def test_foreach_merge_refuses_weights_sharing_foreign_memory(device):
    memory = np.random.default_rng(0).standard_normal(72).astype(np.float32)
    weights = [torch.from_numpy(memory[i : i + 64]).view(8, 8) for i in (0, 8)]
    with unchanged(weights), pytest.raises(ValueError, match=r"weights\[1\]: .*weights\[0\]"):
        F.foreach_merge_(weights, [[], []])


def test_merge_reads_factors_within_weight_before_writing(device):
    """Read as they were before: a merge for good that fails is taken back all the same."""
    weight, _ = weight_and_adapter(24, 24, 1, torch.float32, device)
    other, _ = weight_and_adapter(24, 24, 1, torch.float32, device)
    adapter, want = (weight[:8], weight[:, :8], 0.5), weight.clone()
    F.merge_(want, [(adapter[0].clone(), adapter[1].clone(), 0.5)])
    bad = (torch.full_like(adapter[0], math.nan), adapter[1].clone(), 1.0)
    with unchanged(weight, other), pytest.raises(ValueError, match="finite"):
        F.foreach_merge_([weight, other], [[adapter], [bad]], receipt=False)
    F.merge_(weight, [adapter], receipt=False)
    assert same_bits(weight, want)
