"""Tensor parallelism: torch's styles for ``parallelize_module``, with adapters placed as it suits.

torch's own styles give the same numbers, but shard lora_A along its rank beside columns, so that it
is gathered at each call, and keep all of it beside rows; up to torch 2.10 they also make what was
frozen trainable.
"""

from __future__ import annotations

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, parallel

from fastlora.modules.linear import FastLoRALinear


class ColwiseParallel(parallel.ColwiseParallel):
    """``torch``'s style; lora_B (N, r) is sharded as the weight is, lora_A replicated.

    Raises RuntimeError for a merged layer, TypeError for one of several adapters.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        before = _list_trained(module)
        return _place_adapter(super()._apply(module, device_mesh), before, Replicate())


class RowwiseParallel(parallel.RowwiseParallel):
    """``torch``'s style; lora_A (r, K) is sharded as the weight is, lora_B replicated.

    Raises RuntimeError for a merged layer, TypeError for one of several adapters.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        before = _list_trained(module)
        return _place_adapter(super()._apply(module, device_mesh), before, Shard(1))


def _list_trained(module: nn.Module) -> dict[str, bool]:
    """Lists which parameters are trained."""
    if getattr(module, "holds_lora", False) and not isinstance(module, FastLoRALinear):
        kind = type(module).__name__
        raise TypeError(f"module: expected a linear with one adapter or none, got a {kind}")
    if isinstance(module, FastLoRALinear) and module.merged:
        raise RuntimeError("module: the layer is merged: unmerge_adapter before sharding the model")
    return {name: p.requires_grad for name, p in module.named_parameters()}


def _place_adapter(module: nn.Module, trained: dict[str, bool], lora_A: Placement) -> nn.Module:
    if isinstance(module, FastLoRALinear):
        lora_A_whole = module.lora_A.data
        assert isinstance(lora_A_whole, DTensor)
        module.lora_A = nn.Parameter(lora_A_whole.redistribute(placements=[lora_A]))
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(trained[name])
    return module
