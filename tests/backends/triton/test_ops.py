"""Triton's ops as torch knows them: schemas, their list, in-place writes."""

import pytest
import torch

from fastlora import functional as F
from fastlora.ops.table import OPS
from tests.support.calls import (
    IDS,
    RANKS,
    SCALINGS,
    K,
    M,
    N,
    R,
    S,
    last_arguments,
    linear,
    merge_calls,
    multi_linear,
    operands,
    rand,
)

pytest.importorskip("triton", reason="triton is not installed")

ops = torch.ops.fastlora
OPS_OF_TRITON = [name for name, op in OPS.items() if "triton" in op.backends]


def raw_calls(device):
    x, weight, A, B = (t.to(device) for t in operands(linear))
    y, h, dy, bias = (rand(M, n).to(device) for n in (N, R, N, 1))
    bias, seed = rand(N).to(device), torch.tensor(7, device=device)
    plain, dropped = (0.5, 0.0, None), (0.5, 0.25, seed)
    return {
        "lora_linear": [
            (x, weight, None, A, B, None, *plain),
            (x, weight, bias, A, B, bias, *dropped),
        ],
        "lora_add_": [(y, h, x, A, B, None, *plain), (y, h, x, A, B, bias, *dropped)],
        "lora_linear_backward": [
            (dy, x, weight, A.T.contiguous().T, B.T.contiguous().T, h, *plain, [True] * 6),
            (dy, x, weight, A, B, h, *plain, [True] * 6),
            (dy, x, None, A, B, h, *dropped, [True, False, False] * 2),
        ],
        **multi_calls(device),
    }


def multi_calls(device):
    x, weight, As, Bs = (t.to(device) for t in operands(multi_linear))
    y, h, dy = (rand(M, n).to(device) for n in (N, R, N))
    groups = F.group_rows(IDS.to(device), S)
    own = (SCALINGS.to(device), RANKS.to(device), rand(M).to(device))
    some, every = (*groups.tensors, own[0], None, None), (*groups.tensors, *own)
    # Pages of two ranks, for each of two slices.
    table = torch.tensor([[2, 0], [1, -1]], dtype=torch.int32, device=device)
    pages = (rand(3, 4, K).to(device), rand(3, N, 2).to(device), table, [1, N])
    return {
        "multi_lora_linear": [
            (x, weight, None, As, Bs, *some),
            (x, weight, rand(N).to(device), As, Bs, *every),
        ],
        "multi_lora_add_": [(y, h, x, As, Bs, *some), (y, h, x, As, Bs, *every)],
        "multi_lora_linear_backward": [
            (dy, x, weight, As, Bs, h, *some, [True] * 5),
            (dy, x, None, As, Bs, h, *every, [True, False, False, True, False]),
        ],
        "packed_lora_linear": [
            (x, weight, None, As, Bs, None, [N], *some),
            (x, weight, None, *pages, *every),
        ],
        "packed_lora_add_": [(y, x, As, Bs, None, [N], *some), (y, x, *pages, *every)],
    }


@pytest.mark.parametrize("op", OPS_OF_TRITON)
def test_triton_op_passes_opcheck(op, device, on_triton):
    for args in (raw_calls(device) | merge_calls(device, "triton"))[op]:
        torch.library.opcheck(getattr(ops, op), (*args, *last_arguments(op, "triton")))


def test_triton_ops_are_exactly_those_listed(on_triton):
    calls = {*raw_calls("cpu"), *merge_calls("cpu", "triton")}
    assert calls == set(OPS_OF_TRITON)


def test_in_place_writes_bump_tensor_versions(device, on_triton):
    y, h, *rest = raw_calls(device)["lora_add_"][0]
    before = (y._version, h._version)
    ops.lora_add_(y, h, *rest, False, "triton")
    assert y._version > before[0]
    assert h._version > before[1]
    with torch.inference_mode():
        ops.lora_add_(y.clone(), h.clone(), *rest, False, "triton")
