"""Tensor parallelism over the processes: torch's styles and fastlora's, equal to one process."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Replicate,
    Shard,
    distribute_tensor,
    parallel,
)
from torch.utils.checkpoint import checkpoint

import fastlora
from fastlora import FastLoRALinear, LoRAConfig
from fastlora.model import tensor_parallel
from tests.distributed.nets import assert_same, gradients

K, H, N = 17, 24, 9
STYLES = {
    "torch": (parallel.ColwiseParallel, parallel.RowwiseParallel),
    "fastlora": (tensor_parallel.ColwiseParallel, tensor_parallel.RowwiseParallel),
}


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(K, H), nn.Linear(H, N)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


def pair(**options: Any) -> nn.Module:
    """Column-parallel first, then row-parallel, as it is in one process."""
    config = LoRAConfig(r=5, lora_alpha=8, target_modules=["up", "down"], **options)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = fastlora.replace_linear(Pair(), config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn(parameter.shape) * 0.4)
    return model.train()


def mesh() -> Any:
    return init_device_mesh("cpu", (distributed.get_world_size(),))


def parallelized(model: nn.Module, plan: Any) -> nn.Module:
    """A copy over all processes; torch's own styles may thaw what is frozen."""
    trained = {name: p.requires_grad for name, p in model.named_parameters()}
    other = parallel.parallelize_module(copy.deepcopy(model), mesh(), plan)
    for name, parameter in other.named_parameters():
        parameter.requires_grad_(trained[name])
    return other


def classic(styles: str = "fastlora") -> dict[str, Any]:
    columns, rows = STYLES[styles]
    return {"up": columns(), "down": rows()}


def data() -> tuple[Tensor, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return torch.randn(4, 6, K), torch.randn(4, 6, N)


def assert_equal_to_one(one: nn.Module, other: nn.Module, split: int | None = None) -> None:
    """Outputs, dx, every gradient, and what a step makes of the parameters."""

    def mine(t: Tensor) -> Tensor:
        rank, world = distributed.get_rank(), distributed.get_world_size()
        return t if split is None else t.chunk(world, split)[rank]

    x, dy = data()
    x_one, x_other = x.clone().requires_grad_(), mine(x).clone().requires_grad_()
    optimizers = [
        torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-2)
        for m in (one, other)
    ]
    for _ in range(2):
        want, got = one(x_one), other(x_other)
        want.backward(dy)
        got.backward(mine(dy))
        assert_same(got, mine(want))
        assert_same(x_other.grad, mine(x_one.grad))
        for name, parameter in other.named_parameters():
            if parameter.grad is not None:
                assert parameter.grad.placements == parameter.placements, name
        assert_same(gradients(other), gradients(one))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        x_one.grad = x_other.grad = None
    assert_same(dict(other.named_parameters()), dict(one.named_parameters()))


def columns_then_rows(_: Path) -> None:
    for styles in STYLES:
        for options in ({}, {"bias": "all"}, {"lora_bias": True, "bias": "all"}):
            one = pair(**options)
            assert_equal_to_one(one, parallelized(one, classic(styles)))


def rows_then_columns(_: Path) -> None:
    for styles in STYLES:
        columns, rows = STYLES[styles]
        for between in (
            {},
            # A sum that nobody has added up yet; its gradient comes in parts too.
            {"output_layouts": Partial(), "use_local_output": False},
        ):
            plan = {
                "up": rows(input_layouts=Replicate(), **between),
                "down": columns(output_layouts=Replicate()),
            }
            if between:
                plan["down"] = columns(input_layouts=Partial(), output_layouts=Replicate())
            one = pair(lora_bias=True, bias="all")
            assert_equal_to_one(one, parallelized(one, plan))


def split_sequences_and_batches(_: Path) -> None:
    columns, rows = STYLES["fastlora"]
    for dim in (1, 0):
        plan = {
            "up": columns(input_layouts=Shard(dim)),
            "down": rows(output_layouts=Shard(dim)),
        }
        one = pair(bias="all")
        assert_equal_to_one(one, parallelized(one, plan), dim)


def uneven_shards(_: Path) -> None:
    """23 columns over two processes: all stays a DTensor, or torch forgets the whole's shape."""
    columns, rows = STYLES["fastlora"]
    config = LoRAConfig(
        r=5, lora_alpha=8, lora_bias=True, bias="all", target_modules=["up", "down"]
    )
    torch.manual_seed(0)
    one = Pair()
    one.up, one.down = nn.Linear(K, 23), nn.Linear(23, N)
    fastlora.replace_linear(one, config)
    with torch.no_grad():
        for parameter in one.parameters():
            parameter.normal_(std=0.4)
    plan = {"up": columns(use_local_output=False), "down": rows()}
    assert_equal_to_one(one, parallelized(one, plan))


def half_precision(_: Path) -> None:
    one = pair().to(torch.bfloat16)
    for name, parameter in one.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    other, (x, dy) = parallelized(one, classic()), data()
    x, dy = x.bfloat16(), dy.bfloat16()
    want, got = one(x), other(x)
    want.backward(dy)
    got.backward(dy)
    # Each process rounds its part of the sum to eight bits.
    assert_same(got, want, 2**-6)
    assert_same(gradients(other), gradients(one), 2**-6)
    assert all(p.grad.dtype == torch.float32 for p in other.parameters() if p.grad is not None)


def replicated_layer(_: Path) -> None:
    """All parameters replicated, the batch split: gradients are those of all rows."""
    one = pair(bias="all")
    other = copy.deepcopy(one)
    where = mesh()
    for module in (other.up, other.down):
        for name, parameter in list(module.named_parameters()):
            replicated = distribute_tensor(parameter.data, where, [Replicate()])
            setattr(module, name, nn.Parameter(replicated, parameter.requires_grad))
    x, dy = data()
    one(x).backward(dy)
    y = other(distribute_tensor(x, where, [Shard(0)]))
    assert y.placements == (Shard(0),)
    y.backward(distribute_tensor(dy, where, [Shard(0)]))
    assert_same(y, one(x))
    assert_same(gradients(other), gradients(one))


def sums_and_whole_gradients(_: Path) -> None:
    """x comes as a sum over processes, and the gradient of split columns comes whole."""
    one, (x, _dy) = pair(), data()
    other = parallelized(one, {"up": tensor_parallel.ColwiseParallel(use_local_output=False)})
    world = distributed.get_world_size()
    part = (x / world).requires_grad_()
    y = other.up.forward(DTensor.from_local(part, mesh(), [Partial()], run_check=False))
    y.sum().full_tensor().backward()
    whole = x.clone().requires_grad_()
    want = one.up(whole)
    want.sum().backward()
    assert_same(y, want)
    assert_same(part.grad, whole.grad)
    assert_same(gradients(other.up), gradients(one.up))


def two_dimensions(_: Path) -> None:
    """Columns over one dimension of the mesh, the batch over the other, of size one or two."""
    world, (x, _) = distributed.get_world_size(), data()
    for shape in ((1, world), (world, 1)):
        where = init_device_mesh("cpu", shape)
        one = pair(bias="all")
        other = copy.deepcopy(one)
        for name, parameter in list(other.up.named_parameters()):
            rows = Replicate() if name == "lora_A" else Shard(0)
            sharded = distribute_tensor(parameter.data, where, [Replicate(), rows])
            setattr(other.up, name, nn.Parameter(sharded, parameter.requires_grad))
        y = other.up(distribute_tensor(x, where, [Shard(0), Replicate()]))
        grad = torch.randn(4, 6, H)
        distributed.broadcast(grad, 0)
        y.backward(distribute_tensor(grad, where, [Shard(0), Shard(2)]))
        want = one.up(x)
        want.backward(grad)
        assert_same(y, want)
        assert_same(gradients(other.up), gradients(one.up))


def dropout_of_whole_rows_matches_one_process(_: Path) -> None:
    one = pair(lora_dropout=0.5)
    one.down.lora_dropout = 0.0
    other, (x, dy) = parallelized(one, classic()), data()
    torch.manual_seed(7)
    want = one(x)
    want.backward(dy)
    for recomputed in (False, True):
        # Their generators differ; the first one's seed is everybody's.
        torch.manual_seed(7 + distributed.get_rank())
        got = checkpoint(other, x, use_reentrant=False) if recomputed else other(x)
        got.backward(dy)
        assert_same(got, want)
        assert_same(gradients(other), gradients(one))
        other.zero_grad()


def dropout_of_parts_differs_by_process(_: Path) -> None:
    """A layer that returns dropout(x): y is the mask, and dx must be the same one."""
    layer = FastLoRALinear(64, 64, r=64, lora_alpha=64, lora_dropout=0.5, bias=False)
    with torch.no_grad():
        layer.weight.zero_()
        layer.lora_A.copy_(torch.eye(64))
        layer.lora_B.copy_(torch.eye(64))
    layer.weight.requires_grad_(False)
    plan = tensor_parallel.RowwiseParallel(input_layouts=Replicate())
    parallel.parallelize_module(layer.train(), mesh(), plan)
    x = torch.ones(8, 64, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert_same(x.grad, y)
    assert set(y.unique().tolist()) == {0.0, 2.0}
    left, right = y.chunk(2, 1)
    assert (left != right).any()
