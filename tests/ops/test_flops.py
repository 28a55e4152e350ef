"""FLOP counts of the ops are those of the products that the reference makes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils import flop_counter
from torch.utils.flop_counter import FlopCounterMode

from fastlora.ops import dispatch, registration, run
from fastlora.ops.table import OPS
from tests.ops.test_table import raw_calls
from tests.support.blocks import batch, block, unfused_copy
from tests.support.calls import M, S, last_arguments

# A product that torch's counter does not know.
ADDED = {torch.ops.aten.addmm_: lambda y, a, b, **_: 2 * a[0] * a[1] * b[1]}


def count_flops(call) -> int:
    with FlopCounterMode(display=False, custom_mapping=ADDED) as mode:
        call()
    return mode.get_total_flops()


def op_operands(call: str) -> list:
    """The op's operands; every row has an adapter, of all ranks, and all pages are in use."""
    args = list(raw_calls()[call])
    if call.startswith(("multi", "packed")):
        at = next(i for i, a in enumerate(args) if isinstance(a, Tensor) and a.shape == (M,))
        ids = torch.tensor([0, 1, 1, 0, 1])
        args[at : at + 3] = torch.ops.fastlora.group_rows(ids, S, "torch")
        args[at + 4] = None
        if "packed" in call and args[at - 2] is not None:
            args[at - 2] = torch.tensor([[2, 0], [1, 0]], dtype=torch.int32)
    return args


@pytest.mark.parametrize("call", [c for c in raw_calls() if "lora_" in c])
def test_op_flops_equal_those_of_reference(call):
    name, args = call.split()[0], op_operands(call)
    registration.register_flops()
    function, op = dispatch.implementation(name, "torch"), getattr(torch.ops.fastlora, name)
    want = count_flops(lambda: function(*run.pack(name, args)))
    assert count_flops(lambda: op(*args, *last_arguments(name, "torch"))) == want > 0


@pytest.mark.parametrize("call", [c for c in raw_calls() if "lora_" not in c])
def test_merge_flops_equal_those_of_deltas(call):
    name, args = call.split()[0], op_operands(call)
    registration.register_flops()
    factors = {"merge_": [1], "unmerge_": [1], "swap_": [1, 6], "group_rows": []}[name]
    pairs = [pair for i in factors for pair in zip(args[i], args[i + 1], strict=True)]
    want = sum(2 * B.shape[0] * A.numel() for A, B in pairs)
    assert count_flops(lambda: getattr(torch.ops.fastlora, name)(*args, "torch")) == want


@pytest.mark.parametrize("tracked", [True, False])
def test_model_flops_equal_those_of_unfused_torch(tracked):
    ours, x = block(lora_bias=True), batch().requires_grad_(tracked)
    both = [count_flops(lambda m=m: m(x).sum().backward()) for m in (ours, unfused_copy(ours))]
    assert both[0] == both[1]


def test_flop_counter_started_before_registration_counts(monkeypatch):
    """As where torch's module is imported after fastlora, and its counter is on already."""
    for name in OPS:
        del flop_counter.flop_registry[getattr(torch.ops.fastlora, name)]
    monkeypatch.setattr(registration, "_flops_registered", False)
    ours, x = block(), batch()
    assert count_flops(lambda: ours(x)) == count_flops(lambda: unfused_copy(ours)(x))
