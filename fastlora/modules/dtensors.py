"""DTensors as a model's parameters: adapters whole to be saved, in parts to be loaded."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def is_dtensor(value: object) -> bool:
    """Whether ``value`` is a DTensor; nothing is imported to find out."""
    loaded = sys.modules.get("torch.distributed.tensor")
    return loaded is not None and isinstance(value, loaded.DTensor)


def reshard(model: nn.Module) -> None:
    """Has ``fully_shard``'s modules give back what a forward without backward left gathered.

    Until then their parameters are copies: what is written there is lost.
    """
    loaded = sys.modules.get("torch.distributed.fsdp")
    # What is no model is refused by the next to read it, in words.
    if loaded is not None and isinstance(model, nn.Module):
        for module in model.modules():
            if isinstance(module, loaded.FSDPModule):
                loaded.FSDPModule.reshard(module)


def make_any_flags(model: nn.Module) -> Callable[[list[bool]], list[bool]]:
    """Returns a function: flags that any process of a ``fully_shard`` model has set.

    Its processes exchange the gradients that there are, which must be the same ones in all.
    """
    loaded = sys.modules.get("torch.distributed.fsdp")
    parts = (m for m in model.modules() if loaded and isinstance(m, loaded.FSDPModule))
    if next(parts, None) is None:
        return list
    device = next(model.parameters()).device

    def ask(flags: list[bool]) -> list[bool]:
        counts = torch.tensor(flags, dtype=torch.int32, device=device)
        torch.distributed.all_reduce(counts)
        return [count > 0 for count in counts.tolist()]

    return ask


@contextmanager
def gather(tensors: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor] | None]:
    """Yields the tensors with every DTensor whole, to the one process that is to write them.

    All processes must call, in which the others get None and wait at the end; without DTensors
    each is the one.
    """
    if not any(map(is_dtensor, tensors.values())):
        yield dict(tensors)
        return
    whole = {name: _make_whole(t) if is_dtensor(t) else t for name, t in tensors.items()}
    try:
        yield whole if torch.distributed.get_rank() == 0 else None
    finally:
        torch.distributed.barrier()


def _make_whole(tensor: Any) -> Tensor:
    # Parameters offloaded to the CPU are gathered by the devices of their mesh.
    return tensor.detach().to(tensor.device_mesh.device_type).full_tensor().cpu()


@torch.no_grad()
def copy_whole(parameter: Tensor, value: Tensor) -> None:
    """Copies a whole tensor, the same in every process, into ``parameter``, sharded or not."""
    if is_dtensor(parameter):
        from torch.distributed.tensor import distribute_tensor

        to: Any = parameter
        mesh, placements = to.device_mesh, to.placements
        # Each process keeps its part of what it has: nothing is sent.
        value = value.to(mesh.device_type, parameter.dtype)
        value = distribute_tensor(value, mesh, placements, src_data_rank=None)
    parameter.copy_(value)


def check_whole(name: str, layer: Any, r: int, parameters: Mapping[str, Tensor]) -> None:
    """Raises RuntimeError where a process holds a flat part of parameters: FSDP1's, ZeRO's."""
    N, K = layer.out_features, layer.in_features
    weight = (K, N) if layer.fan_in_fan_out else (N, K)
    shapes = {"weight": weight, "lora_A": (r, K), "lora_B": (N, r), "lora_bias": (N,)}
    for kind, parameter in parameters.items():
        if tuple(parameter.shape) != shapes[kind]:
            raise RuntimeError(
                f"{name}: {kind}: expected shape {shapes[kind]}, got {tuple(parameter.shape)}: its "
                "values are spread over processes; gather them first, by FSDP.summon_full_params "
                "or deepspeed.zero.GatheredParameters"
            )
