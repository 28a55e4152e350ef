"""Triton merges that fail between launches leave every weight as before."""

from __future__ import annotations

import pytest
import torch

from fastlora import functional as F
from fastlora.ops import dispatch
from tests.support.calls import weight_and_adapter
from tests.support.helpers import same_bits, unchanged
from tests.thinning import skip_where

pytestmark = pytest.mark.usefixtures("triton_usable")
merge_batch = pytest.importorskip("fastlora.kernels.merge.batch")


def two_kinds_of_weights(device, ratio: float = 1.0):
    """Two kinds of weights, so two launches; a ratio of 1 fills the pool, so more of them."""
    dtypes = [torch.bfloat16, torch.bfloat16, torch.float32]
    pairs = [weight_and_adapter(70, 66, 5, dtype, device, ratio) for dtype in dtypes]
    return [weight for weight, _ in pairs], [[adapter] for _, adapter in pairs]


def flipped_adapters(adapters):
    return [[(A.flip(0), B, scaling) for A, B, scaling in some] for some in adapters]


def fail_at_call(monkeypatch, name: str, call: int, error: type[BaseException]):
    """The call-th call of a method of Batch ends in an error, before it has done anything."""
    original, calls = getattr(merge_batch.Batch, name), []

    def method(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            raise error
        return original(self, *args, **kwargs)

    monkeypatch.setattr(merge_batch.Batch, name, method)


def makes_nothing(step, name) -> str | None:
    makers = {"receipts": ("merge", "swap"), "_pool": ("merge", "for good", "swap")}
    return None if step in makers.get(name, (step,)) else f"{step} makes nothing there"


@skip_where(makes_nothing)
@pytest.mark.parametrize("step", ["merge", "for good", "swap", "unmerge"])
@pytest.mark.parametrize(
    "name, call, error",
    [
        ("run", 2, KeyboardInterrupt),
        ("settle", 1, KeyboardInterrupt),
        ("settle", 2, RuntimeError),
        ("receipts", 2, torch.OutOfMemoryError),
        ("_pool", 3, torch.OutOfMemoryError),
    ],
)
def test_failure_between_launches_changes_nothing(monkeypatch, device, step, name, call, error):
    weights, adapters = two_kinds_of_weights(device)
    with dispatch.use_backend("triton"):
        receipts = F.foreach_merge_(weights, adapters) if step in ("swap", "unmerge") else []
        fail_at_call(monkeypatch, name, call, error)
        act = {
            "merge": lambda: F.foreach_merge_(weights, adapters),
            "for good": lambda: F.foreach_merge_(weights, adapters, receipt=False),
            "swap": lambda: F.foreach_swap_(weights, receipts, flipped_adapters(adapters)),
            "unmerge": lambda: F.foreach_unmerge_(weights, receipts),
        }[step]
        with unchanged(weights), pytest.raises(error):
            act()


def test_taking_back_allocates_nothing_of_weight_size(monkeypatch, device):
    """Where memory has run out there is none for it."""
    weights, adapters = two_kinds_of_weights(device)
    adapters[2][0][1][3, 2] = float("nan")
    with dispatch.use_backend("triton"), unchanged(weights):

        def taken_back(self, original=merge_batch.Batch.take_back):
            def none(*_, **__):
                raise torch.OutOfMemoryError

            with monkeypatch.context() as patch:
                for name in ("empty", "zeros", "tensor", "arange"):
                    patch.setattr(torch, name, none)
                original(self)

        monkeypatch.setattr(merge_batch.Batch, "take_back", taken_back)
        with pytest.raises(ValueError, match=r"weights\[2\]: .*finite"):
            F.foreach_merge_(weights, adapters)


@pytest.mark.parametrize("ratio", [0.001, 1.0])
def test_pool_too_small_is_made_larger(monkeypatch, device, ratio):
    launches = []
    original = merge_batch.Batch._launch
    monkeypatch.setattr(
        merge_batch.Batch, "_launch", lambda self, n: (launches.append(n), original(self, n))[1]
    )
    weight, adapter = weight_and_adapter(300, 130, 5, torch.bfloat16, device, ratio)
    before = weight.clone()
    with dispatch.use_backend("triton"):
        receipt = F.merge_(weight, [adapter])
        assert len(launches) == (1 if ratio < 0.1 else 2)
        F.unmerge_(weight, receipt)
    assert same_bits(weight, before)


def test_weights_of_one_kind_share_a_launch(monkeypatch, device):
    runs = []
    original = merge_batch.Batch.run
    monkeypatch.setattr(
        merge_batch.Batch, "run", lambda self: (runs.append(len(self.jobs)), original(self))[1]
    )
    pairs = [weight_and_adapter(8 * n, 16, 8, torch.bfloat16, device) for n in range(1, 6)]
    with dispatch.use_backend("triton"):
        F.foreach_merge_([w for w, _ in pairs], [[adapter] for _, adapter in pairs])
    assert runs == [5]
