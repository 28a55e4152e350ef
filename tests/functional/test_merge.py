"""merge_, unmerge_ and swap_: one rounding in, every bit back, or an error."""

import math

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from fastlora import functional as F
from fastlora.backends.torch import merge as exact
from fastlora.ops import availability
from tests.support.calls import MERGED, assert_one_rounding, assert_swapped, weight_and_adapter
from tests.support.helpers import LAYOUTS, Interrupt, Spy, same_bits, unchanged

pytestmark = pytest.mark.usefixtures("whole_backend")

CPU = torch.device("cpu")
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("ratio", [1e-3, 1e-2, 1e-1, 1.0])
@pytest.mark.parametrize("dtype", FLOATS)
def test_merge_rounds_once_and_unmerge_restores(dtype, ratio, device):
    weight, adapter = weight_and_adapter(65, 431, 5, dtype, device, ratio)
    before, address = weight.clone(), weight.data_ptr()
    with unchanged(adapter):
        receipt = F.merge_(weight, [adapter])
        assert weight.data_ptr() == address
        assert_one_rounding(weight, before, [adapter])
        assert not torch.equal(weight, before)
        F.unmerge_(weight, receipt)
    assert weight.data_ptr() == address
    assert same_bits(weight, before)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    "N, K, R",
    [(1, 1, 1), (63, 31, 16), (1, 2049, 3), (2049, 3, 2), (3, 70001, 2), (300, 431, 1), (5, 7, 0)],
)
def test_merge_round_trips_for_any_shape(N, K, R, dtype, device):
    """Several tiles high, and wider than a tile."""
    weight, adapter = weight_and_adapter(N, K, R, dtype, device)
    before = weight.clone()
    receipt = F.merge_(weight, [adapter])
    assert_one_rounding(weight, before, [adapter])
    F.unmerge_(weight, receipt)
    assert same_bits(weight, before)


@pytest.mark.parametrize("N, K", [(0, 5), (5, 0), (0, 0)])
@pytest.mark.parametrize("adapters", [0, 1])
def test_merge_and_unmerge_accept_empty_weight(N, K, adapters, device):
    weight, adapter = weight_and_adapter(N, K, 2, torch.float32, device)
    F.unmerge_(weight, F.merge_(weight, [adapter] * adapters))
    assert weight.shape == (N, K)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_merge_has_same_bits_for_any_strides(layout, dtype, device):
    """Same bits whatever the layout; what lies between the elements is not touched."""
    plain, adapter = weight_and_adapter(37, 2100, 3, dtype, device)
    weight = layout(plain)
    around = torch.as_strided(
        weight, (weight.untyped_storage().nbytes() // weight.itemsize,), (1,), 0
    )
    outside, strides = around.clone(), weight.stride()
    receipt = F.merge_(weight, [tuple(layout(t) for t in adapter[:2]) + adapter[2:]])
    merged = weight.clone()
    F.merge_(plain, [adapter], receipt=False)
    assert same_bits(merged, plain)
    F.unmerge_(weight, receipt)
    assert weight.stride() == strides
    assert same_bits(around, outside)


@pytest.mark.parametrize("lora_dtype", FLOATS)
def test_merge_sums_adapters_of_any_dtype(lora_dtype, device):
    weight, first = weight_and_adapter(33, 65, 4, torch.bfloat16, device, lora_dtype=lora_dtype)
    _, second = weight_and_adapter(33, 65, 9, torch.bfloat16, device, ratio=0.3)
    _, empty = weight_and_adapter(33, 65, 0, torch.bfloat16, device)
    adapters, before = [first, second, empty], weight.clone()
    receipt = F.merge_(weight, adapters)
    assert_one_rounding(weight, before, adapters)
    F.unmerge_(weight, receipt)
    assert same_bits(weight, before)


def test_stacked_merges_are_undone_in_reverse(device):
    weight, _ = weight_and_adapter(33, 65, 4, torch.bfloat16, device)
    states, receipts = [weight.clone()], []
    for _ in range(3):
        _, adapter = weight_and_adapter(33, 65, 4, torch.bfloat16, device, ratio=0.3)
        receipts.append(F.merge_(weight, [adapter]))
        states.append(weight.clone())
    with unchanged(weight), pytest.raises(RuntimeError, match=MERGED):
        F.unmerge_(weight, receipts[0])
    for receipt in reversed(receipts):
        assert same_bits(weight, states.pop())
        F.unmerge_(weight, receipt)
    assert same_bits(weight, states.pop())


@pytest.mark.parametrize("ratio", [1e-3, 1.0])
@pytest.mark.parametrize("dtype", FLOATS)
def test_swap_takes_old_adapters_out_and_puts_new_in(dtype, ratio, device):
    weight, first = weight_and_adapter(65, 431, 5, dtype, device, ratio)
    # Ranks enough: of two the bound has no room for factors that share their column's grid.
    second, third = (weight_and_adapter(65, 431, R, dtype, device, ratio)[1] for R in (9, 8))
    before, address = weight.clone(), weight.data_ptr()
    receipt = F.merge_(weight, [first, second])
    merged = weight.clone()
    with unchanged(first, second, third):
        receipt = F.swap_(weight, receipt, [third])
    assert weight.data_ptr() == address
    assert_swapped(weight, merged, [first, second], [third])
    # Not even the old ones' rounding is left.
    assert_one_rounding(weight, before, [third])
    assert not torch.equal(weight, merged)
    F.unmerge_(weight, receipt)
    assert same_bits(weight, before)


@pytest.mark.parametrize("N, K, R", [(0, 5, 2), (1, 1, 1), (1, 2049, 3), (300, 431, 1), (5, 7, 0)])
def test_swap_to_and_fro_restores_bits_for_any_shape(N, K, R, device):
    """From nothing merged to something, and to nothing again."""
    weight, adapter = weight_and_adapter(N, K, R, torch.bfloat16, device, ratio=0.3)
    before, receipt = weight.clone(), F.merge_(weight, [])
    for adapters in ([adapter], [adapter, adapter], [adapter], []):
        receipt = F.swap_(weight, receipt, adapters)
        assert_one_rounding(weight, before, adapters)
        assert len(receipt.adapters) == len(adapters)
    assert same_bits(weight, before)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_swap_has_same_bits_for_any_strides(layout, dtype, device):
    plain, first = weight_and_adapter(37, 2100, 3, dtype, device)
    _, second = weight_and_adapter(37, 2100, 2, dtype, device)
    weight = layout(plain)
    around = torch.as_strided(
        weight, (weight.untyped_storage().nbytes() // weight.itemsize,), (1,), 0
    )
    outside = around.clone()
    receipt = F.swap_(
        weight, F.merge_(weight, [first]), [tuple(map(layout, second[:2])) + second[2:]]
    )
    F.merge_(plain, [second], receipt=False)
    assert same_bits(weight, plain)
    F.unmerge_(weight, receipt)
    assert same_bits(around, outside)


@pytest.mark.parametrize("how", ["not finite", "edited", "receipt of before"])
def test_failed_swap_leaves_old_adapter_merged(how):
    weight, first = weight_and_adapter(300, 431, 3, torch.bfloat16, ratio=0.3)
    _, second = weight_and_adapter(300, 431, 3, torch.bfloat16, ratio=0.3)
    before, receipt = weight.clone(), F.merge_(weight, [first])
    wrong, error, message, kept = receipt, RuntimeError, MERGED, weight[250, 4].clone()
    if how == "edited":
        weight[250, 4] += 1
    elif how == "receipt of before":
        receipt = F.swap_(weight, wrong, [first, second])
    else:
        second[1][250, 1] = math.nan
        error, message = ValueError, r"adapters: merging gives .*not finite"
    with unchanged(weight), pytest.raises(error, match=message):
        F.swap_(weight, wrong, [second])
    if how == "edited":
        weight[250, 4] = kept
    F.unmerge_(weight, receipt)
    assert same_bits(weight, before)


def test_parameter_is_merged_without_a_graph():
    weight, adapter = weight_and_adapter(9, 7, 2, torch.float32)
    parameter = torch.nn.Parameter(weight)
    A, B = (t.requires_grad_() for t in adapter[:2])
    version = parameter._version
    F.unmerge_(parameter, F.merge_(parameter, [(A, B, adapter[2])]))
    assert parameter.grad_fn is None
    assert parameter._version > version


def test_merge_bits_do_not_depend_on_threads():
    results = []
    plain, adapter = weight_and_adapter(300, 431, 16, torch.float32)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            weight = plain.clone()
            receipt = F.merge_(weight, [adapter])
        finally:
            torch.set_num_threads(1)
        results.append((weight, receipt.positions, receipt.checksums))
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("receipt", [False, True])
def test_merge_allocates_no_more_than_a_tile(receipt):
    """Beside the receipt nothing larger than a tile."""
    weight, adapter = weight_and_adapter(700, 512, 4, torch.bfloat16, ratio=0.01)
    with Spy() as spy:
        made = F.merge_(weight, [adapter], receipt=receipt)
    assert spy.sizes()[0] <= exact.TILE < weight.numel()
    assert (made is None) != receipt
    if made is not None:
        with Spy() as spy:
            F.unmerge_(weight, made)
        assert spy.sizes()[0] <= exact.TILE


@pytest.mark.parametrize("how", ["adapter", "overflow"])
@pytest.mark.parametrize("row", [0, 250])
def test_merge_with_non_finite_result_changes_nothing(how, row):
    """In the first tile, and in one after others were written."""
    weight, (A, B, scaling) = weight_and_adapter(300, 431, 3, torch.float16)
    if how == "adapter":
        B[row, 1] = math.nan
    else:
        weight[row, 7] = 65504
        B[row], A[:, 7] = 1.0, 1e6 * math.copysign(1, scaling)
    with (
        unchanged(weight),
        pytest.raises(ValueError, match=r"adapters: merging gives .*not finite"),
    ):
        F.merge_(weight, [(A, B, scaling)])


# Five tiles: written one after the other, each after three sums or so.
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op, count", [("copy_", 1), ("copy_", 3), ("copy_", 5), ("sum", 6)])
def test_interrupted_merge_changes_nothing(op, count, layout):
    plain, (A, B, scaling) = weight_and_adapter(700, 431, 3, torch.bfloat16, ratio=0.3)
    weight = layout(plain)
    interrupt = Interrupt(op, count, weight if op == "copy_" else None)
    with unchanged(weight), pytest.raises(KeyboardInterrupt), interrupt:
        exact.merge_one_(weight, [A], [B], [scaling], True)


@pytest.mark.parametrize("op, count", [("copy_", 1), ("copy_", 3), ("copy_", 5), ("sum", 6)])
def test_interrupted_unmerge_changes_nothing(op, count):
    weight, (A, B, scaling) = weight_and_adapter(700, 431, 3, torch.bfloat16, ratio=0.3)
    before = weight.clone()
    adapter = ([A], [B], [scaling])
    parts = exact.merge_one_(weight, *adapter, True)
    interrupt = Interrupt(op, count, weight if op == "copy_" else None)
    with unchanged(weight), pytest.raises(KeyboardInterrupt), interrupt:
        exact.unmerge_one_(weight, *adapter, *parts)
    exact.unmerge_one_(weight, *adapter, *parts)
    assert same_bits(weight, before)


# One backend for all examples.
@settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    N=st.integers(0, 40),
    K=st.integers(0, 40),
    ranks=st.lists(st.integers(0, 5), max_size=3),
    dtype=st.sampled_from(FLOATS),
    ratio=st.floats(1e-4, 10),
    layout=st.sampled_from(LAYOUTS),
    seed=st.integers(0, 2**32),
)
def test_unmerge_restores_bits_for_random_weights(
    whole_backend, N, K, ranks, dtype, ratio, layout, seed
):
    assume(availability.cannot(whole_backend, CPU, dtype) is None)
    torch.manual_seed(seed)
    weight = layout(weight_and_adapter(N, K, 1, dtype)[0])
    adapters = [weight_and_adapter(N, K, R, dtype, ratio=ratio)[1] for R in ranks]
    with unchanged(weight, adapters):
        F.unmerge_(weight, F.merge_(weight, adapters))
