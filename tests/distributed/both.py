"""fully_shard over one dimension of a mesh, tensor parallelism over the other: four processes."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import parallel

import fastlora
from fastlora.model.tensor_parallel import ColwiseParallel, RowwiseParallel
from tests.distributed.nets import (
    assert_same,
    batches,
    loss_of,
    mean_over_processes,
    net,
    optimizer_of,
    train,
    trainable_parameters,
)


def same_as_one_process(folder: Path) -> None:
    across, within = 2, distributed.get_world_size() // 2
    mesh = init_device_mesh("cpu", (across, within), mesh_dim_names=("data", "tensor"))
    one, other = net(), net()
    for block in other.blocks:
        plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
        parallel.parallelize_module(block, mesh["tensor"], plan)
        fully_shard(block, mesh=mesh["data"])
    fully_shard(other, mesh=mesh["data"])
    optimizer, losses, data = optimizer_of(other), [], batches(3)
    for batch in data:
        optimizer.zero_grad()
        loss = loss_of(other, [t.chunk(across)[mesh["data"].get_local_rank()] for t in batch])
        loss.backward()
        optimizer.step()
        losses.append(mean_over_processes(loss))
    assert losses == pytest.approx(train(one, data, alone=True), rel=1e-5)
    fastlora.save_adapter(other, folder / "adapter")
    loaded = fastlora.load_adapter(net(), folder / "adapter", is_trainable=True)
    assert_same(trainable_parameters(loaded), trainable_parameters(one))
    fastlora.load_adapter(other, folder / "adapter", is_trainable=True)
    assert_same(trainable_parameters(other), trainable_parameters(one))
