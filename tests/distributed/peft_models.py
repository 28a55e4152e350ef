"""Patched PEFT models over the processes: equal to one process, on fastlora's kernels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fastlora
from fastlora.integrations.peft import linear as peft_linear
from tests.distributed.nets import Net, assert_same, batches, train, trainable_parameters
from tests.support.patched import fill_adapters


def patched() -> Any:
    torch.manual_seed(4)
    settings = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["up", "down"])
    model = fill_adapters(peft.get_peft_model(Net(), settings))
    fastlora.patch_peft(model, strict=True)
    return model


class Counted:
    """How many layers ran on fastlora while ``with`` it."""

    def __enter__(self) -> Counted:
        self.count, self.before = 0, peft_linear._run_one_for_all

        def counting(*args: Any) -> Any:
            self.count += 1
            return self.before(*args)

        peft_linear._run_one_for_all = counting
        return self

    def __exit__(self, *_: object) -> None:
        peft_linear._run_one_for_all = self.before


def data_parallel(_: Path) -> None:
    one, other = patched(), patched()
    data = batches(3)
    want = train(one, data, alone=True)
    with Counted() as layers:
        assert train(DistributedDataParallel(other), data) == pytest.approx(want, rel=1e-5)
    assert layers.count == 3 * _linears(one)
    assert_same(trainable_parameters(other), trainable_parameters(one))


def fully_sharded(_: Path) -> None:
    one, other = patched(), patched()
    for block in other.base_model.model.blocks:
        fully_shard(block)
    fully_shard(other)
    data = batches(3)
    want = train(one, data, alone=True)
    with Counted() as layers:
        assert train(other, data) == pytest.approx(want, rel=1e-5)
    assert layers.count == 3 * _linears(one)
    assert_same(trainable_parameters(other), trainable_parameters(one))


def patched_when_sharded(_: Path) -> None:
    """What it cannot see it leaves to PEFT, and says why."""
    one, other = patched(), patched()
    fastlora.unpatch_peft(other)
    for block in other.base_model.model.blocks:
        fully_shard(block)
    with pytest.raises(ValueError, match="has a weight of type DTensor"):
        fastlora.patch_peft(other)
    data = batches(2)
    assert train(other, data) == pytest.approx(train(one, data, alone=True), rel=1e-5)


def _linears(model: nn.Module) -> int:
    return len(fastlora.report(model).replaced)
