"""DistributedDataParallel over the processes, equal to one process."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

import fastlora
from tests.distributed.nets import (
    assert_same,
    batches,
    gradients,
    loss_of,
    mean_over_processes,
    net,
    optimizer_of,
    rows_of_process,
    train,
    trainable_parameters,
)

NAMES = ("anna", "ben", "dora")


def same_as_one_process(folder: Path) -> None:
    for options in ({}, {"static_graph": True}, {"gradient_as_bucket_view": True}):
        one, other = net(bias="all"), net(bias="all")
        wrapped = DistributedDataParallel(other, **options)
        data = batches(3)
        # A mean of halves of a step's loss, rounded to seven digits.
        assert train(wrapped, data) == pytest.approx(train(one, data, alone=True), rel=1e-5)
        assert_same(trainable_parameters(other), trainable_parameters(one))
    if distributed.get_rank() == 0:
        fastlora.save_adapter(wrapped, folder / "adapter")
        fastlora.load_adapter(one, folder / "adapter")
        x, _ = data[0]
        assert torch.equal(one(x), other(x))
    distributed.barrier()


def accumulated(_: Path) -> None:
    """Two small batches, the first without synchronisation, are one big one."""
    one, other = net(), net()
    wrapped, data = DistributedDataParallel(other), batches(1, rows=8)[0]
    loss_of(one, data).backward()
    first, second = zip(*(t.chunk(2) for t in data), strict=True)
    with wrapped.no_sync():
        (loss_of(wrapped, rows_of_process(first)) / 2).backward()
    (loss_of(wrapped, rows_of_process(second)) / 2).backward()
    assert_same(gradients(other), gradients(one))


def several_adapters(_: Path) -> None:
    """Rows of adapters that other processes have none of, and one adapter without any."""
    one, other = net(adapter_names=NAMES), net(adapter_names=NAMES)
    wrapped = DistributedDataParallel(other, find_unused_parameters=True)
    rows = [["anna", None], ["ben", "anna"]]
    mine = rows[distributed.get_rank()]
    optimizers = [optimizer_of(model) for model in (one, other)]
    for batch in batches(3):
        loss = _losses(one, [*rows[0], *rows[1]], batch)
        mean = _losses(wrapped, mine, rows_of_process(batch))
        assert mean_over_processes(mean) == pytest.approx(loss.item() / 2, rel=1e-5)
        assert_same(gradients(other), {n: g / 2 for n, g in gradients(one).items()})
        assert not any("dora" in name for name in gradients(other))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def _losses(model: nn.Module, rows: Sequence[str | None], batch: Any) -> torch.Tensor:
    x, target = batch
    with fastlora.use_adapters(model, rows):
        loss = (model(x) - target).square().sum()
        loss.backward()
    return loss
