"""Long random walks of merging, unmerging and swapping lose not a bit."""

import os
import random

import pytest
import torch

from fastlora import functional as F
from fastlora.ops import availability, dispatch
from tests.support.calls import MERGED, weight_and_adapter
from tests.support.helpers import LAYOUTS, bits, same_bits, unchanged

FLOATS = [torch.float16, torch.bfloat16, torch.float32]
# Interpreted kernels take a thousand times a compiled one's time, the host's fibers ten times.
CYCLES = {"torch": 1000, "cpu": 1000, "cuda": 60}
CYCLES["triton"] = int(os.environ.get("FASTLORA_TEST_CYCLES", "25"))
SPECIAL = [0.0, -0.0, float("inf"), -float("inf"), float("nan")]


def weight_with_everything(N: int, K: int, dtype: torch.dtype, device) -> torch.Tensor:
    """Ordinary numbers, and zeros of both signs, denormals, infinities and a NaN among them."""
    weight, _ = weight_and_adapter(N, K, 1, dtype, device)
    tiny = torch.finfo(dtype).tiny
    special = torch.tensor([*SPECIAL, tiny / 4, -tiny / 8, tiny], dtype=dtype, device=device)
    places = torch.randperm(N * K, device=device)[: len(special)]
    flat = weight.flatten()
    flat[places] = special
    return flat.view(N, K)


@pytest.mark.parametrize("dtype", FLOATS)
def test_thousand_merge_cycles_restore_every_bit(dtype, merge_backend, device):
    cycles = 1000 if device.type == "cuda" else CYCLES[merge_backend]
    draw = random.Random(torch.randint(1 << 30, ()).item())
    N, K = 70, 68
    weight = draw.choice(LAYOUTS)(weight_with_everything(N, K, dtype, device))
    before, state, held = bits(weight).clone(), bits(weight).clone(), []

    def adapter():
        ratio, R = 10 ** draw.uniform(-3, 0), draw.choice([1, 3, 8, 17])
        lora = draw.choice(FLOATS)
        return weight_and_adapter(N, K, R, dtype, device, ratio, lora_dtype=lora)[1]

    for _ in range(cycles):
        step = draw.choice(["merge", "swap", "unmerge", "unmerge"])
        if step == "merge" and len(held) < 4:
            held.append((bits(weight).clone(), F.merge_(weight, [adapter()])))
        elif step == "swap" and held:
            held[-1] = (held[-1][0], F.swap_(weight, held[-1][1], [adapter(), adapter()]))
        elif held:
            state, receipt = held.pop()
            F.unmerge_(weight, receipt)
            assert torch.equal(bits(weight), state)
    while held:
        F.unmerge_(weight, held.pop()[1])
    assert torch.equal(bits(weight), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_stack_without_one_adapter_has_others_bits(dtype, merge_backend):
    weight = weight_with_everything(40, 36, dtype, torch.device("cpu"))
    adapters = {n: [weight_and_adapter(40, 36, 4, dtype, ratio=0.3)[1]] for n in "abcd"}

    def rest(names: str) -> torch.Tensor:
        want = before.clone()
        for name in names:
            F.merge_(want, adapters[name], receipt=False)
        return want

    before, stack = weight.clone(), F.MergeStack(weight)
    for name in "abc":
        stack.merge(name, adapters[name])
    assert same_bits(weight, rest("abc"))
    stack.remove("b")
    assert stack.names == ("a", "c")
    assert same_bits(weight, rest("ac"))
    stack.swap("a", adapters["d"])
    assert stack.names == ("a", "c")
    assert same_bits(weight, rest("dc"))
    for name in "ca":
        stack.remove(name)
    assert same_bits(weight, before)


@pytest.mark.parametrize("step", ["remove", "swap"])
def test_stack_is_unchanged_when_a_step_fails(step, merge_backend):
    weight, _ = weight_and_adapter(40, 36, 4, torch.bfloat16)
    adapters = {n: [weight_and_adapter(40, 36, 4, torch.bfloat16)[1]] for n in "abc"}
    before, stack = weight.clone(), F.MergeStack(weight)
    for name in "abc":
        stack.merge(name, adapters[name])
    A, B, scaling = adapters["a"][0]
    bad = [(A * float("nan"), B, scaling)]
    with unchanged(weight):
        with pytest.raises(ValueError, match="name: expected one that is not merged yet, got 'b'"):
            stack.merge("b", adapters["a"])
        with pytest.raises(ValueError, match=r"name: expected one of .*, got 'd'"):
            stack.remove("d")
        with pytest.raises(ValueError, match="not finite"):
            stack.swap("a", bad)
        kept = weight[3, 4].clone()
        weight[3, 4] += 1
        with unchanged(weight), pytest.raises(RuntimeError, match=MERGED):
            stack.remove("a") if step == "remove" else stack.swap("a", adapters["b"])
        weight[3, 4] = kept
    assert stack.names == ("a", "b", "c")
    for name in "acb":
        stack.remove(name)
    assert same_bits(weight, before)


def test_backend_refuses_receipt_of_another_backend():
    weight, adapter = weight_and_adapter(40, 36, 4, torch.bfloat16)
    before = weight.clone()
    for backend in ("torch", "cpu", "triton"):
        if availability.cannot(backend, weight.device, weight.dtype) is not None:
            continue
        with dispatch.use_backend(backend):
            receipt = F.merge_(weight, [adapter])
        # Whatever is asked for by then: a receipt is undone by what made it.
        with dispatch.use_backend("torch"):
            F.unmerge_(weight, receipt)
        assert same_bits(weight, before)
        assert receipt.backend == backend
