"""Models under tensor parallelism: compiled, saved and loaded, without adapters, refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Replicate,
    Shard,
    distribute_tensor,
    parallel,
)

import fastlora
from fastlora import LoRAConfig
from fastlora import functional as F
from fastlora.model import tensor_parallel
from fastlora.modules import dtensor_linear as sharding
from tests.distributed.nets import assert_same, gradients, net
from tests.distributed.tensor_parallel import (
    H,
    K,
    Pair,
    classic,
    data,
    mesh,
    pair,
    parallelized,
)


def compiled(_: Path) -> None:
    one = pair(bias="all")
    other, (x, dy) = parallelized(one, classic()), data()
    got, want = torch.compile(other, backend="aot_eager", fullgraph=True)(x), one(x)
    got.backward(dy)
    want.backward(dy)
    assert_same(got, want)
    assert_same(gradients(other), gradients(one))


def a_saved_adapter_is_whole(folder: Path) -> None:
    one = pair(bias="all", lora_bias=True)
    other = parallelized(one, classic())
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(-1.5)
    fastlora.save_adapter(other, folder / "adapter")
    fastlora.load_adapter(one, folder / "adapter")
    for name, parameter in one.named_parameters():
        if not name.endswith("weight"):
            assert torch.equal(parameter, dict(other.named_parameters())[name].full_tensor()), name
    third = parallelized(pair(bias="all", lora_bias=True), classic("torch"))
    fastlora.load_adapter(third, folder / "adapter", is_trainable=True)
    assert all(isinstance(p, DTensor) for p in third.parameters())
    x, _ = data()
    assert_same(third(x), one(x))


def base_alone(_: Path) -> None:
    one = pair()
    other, (x, _) = parallelized(one, classic()), data()
    with fastlora.disable_adapter(one), fastlora.disable_adapter(other):
        assert_same(other(x), one(x))


def styles_keep_frozen_parameters_frozen(_: Path) -> None:
    other = parallel.parallelize_module(pair(), mesh(), classic())
    for name, parameter in other.named_parameters():
        assert parameter.requires_grad == ("lora_" in name)
    assert other.up.lora_A.placements == other.down.lora_B.placements == (Replicate(),)
    assert other.up.lora_B.placements == (Shard(0),)
    assert other.down.lora_A.placements == (Shard(1),)
    merged = pair()
    fastlora.merge_adapter(merged)
    for style in (tensor_parallel.ColwiseParallel(), tensor_parallel.RowwiseParallel()):
        with pytest.raises(RuntimeError, match="module: the layer is merged"):
            parallel.parallelize_module(merged.up, mesh(), style)
    several = net(adapter_names=["anna", "ben"]).blocks[0]
    for style in (tensor_parallel.ColwiseParallel(), tensor_parallel.RowwiseParallel()):
        with pytest.raises(TypeError, match="module: expected a linear with one adapter or none"):
            parallel.parallelize_module(several, mesh(), {"up": style})
    plain = parallel.parallelize_module(nn.Linear(K, H), mesh(), tensor_parallel.ColwiseParallel())
    assert plain.weight.placements == (Shard(0),)


def refusals(_: Path) -> None:
    one = pair()
    other, (x, _) = parallelized(one, classic()), data()
    up = other.up
    with pytest.raises(TypeError, match="x: expected a DTensor beside a weight"):
        up.forward(x)
    plain = one.up.weight, one.up.lora_A, one.up.lora_B
    whole = distribute_tensor(x, mesh(), [Replicate()])
    for at, name in enumerate(("weight", "lora_A", "lora_B")):
        operands = list(plain)
        operands[at] = getattr(up, name)
        with pytest.raises(TypeError, match=f"^{name}: .*got a DTensor"):
            F.lora_linear(x, *operands, 1.0)
        with torch.no_grad(), pytest.raises(TypeError, match=f"^{name}: .*got a DTensor"):
            F.lora_linear(x, *operands, 1.0)
    with pytest.raises(TypeError, match=r"^x: .*got a DTensor"):
        F.lora_linear(whole, *plain, 1.0)
    with pytest.raises(TypeError, match=r"^lora_A: .*got a DTensor"):
        F.lora_add_(torch.zeros(4, 6, H), x, up.lora_A, one.up.lora_B, 1.0)
    ids, scalings = torch.zeros(4, dtype=torch.int32), torch.ones(1)
    with pytest.raises(TypeError, match=r"^lora_A: .*got a DTensor"):
        F.multi_lora_linear(x, plain[0], up.lora_A[None], plain[2][None], ids, scalings)
    with pytest.raises(TypeError, match=r"^lora_A: .*got a DTensor"):
        F.merge_(plain[0].detach().clone(), [(up.lora_A, plain[2], 1.0)])
    with pytest.raises(TypeError, match="lora_B: expected a DTensor beside"):
        sharding.lora_linear(whole, up.weight, up.lora_A, plain[2], 1.0)
    elsewhere = init_device_mesh("cpu", (1, distributed.get_world_size()))
    there = distribute_tensor(plain[1].detach(), elsewhere, [Replicate()] * 2)
    with pytest.raises(ValueError, match="lora_A: expected the weight's mesh"):
        sharding.lora_linear(whole, up.weight, there, up.lora_B, 1.0)
    sums = DTensor.from_local(plain[0].detach(), mesh(), [Partial()], run_check=False)
    with pytest.raises(ValueError, match="weight: expected Shard or Replicate placements"):
        sharding.lora_linear(whole, sums, up.lora_A, up.lora_B, 1.0)
    before = {name: p.to_local().clone() for name, p in other.named_parameters()}
    with pytest.raises(TypeError, match="sharded over processes; gather it before merging"):
        fastlora.merge_adapter(other)
    with pytest.raises(TypeError, match="sharded over processes"):
        up.merge()
    assert all(torch.equal(p.to_local(), before[n]) for n, p in other.named_parameters())
    bare = parallel.parallelize_module(Pair(), mesh(), classic("torch"))
    with pytest.raises(ValueError, match="sharded over processes already"):
        fastlora.replace_linear(bare, LoRAConfig(r=2, target_modules=["up"]))
