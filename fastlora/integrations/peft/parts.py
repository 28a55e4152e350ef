"""Parts of PEFT's LoRA layers, and whether they can be computed without calling them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import layer as lora
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.nn.modules import module as every_module
from transformers.pytorch_utils import Conv1D

from fastlora.backends.dtypes import FLOATS

# Types of plain tensors; a DTensor or a quantized weight is of another.
_DENSE = (Tensor, nn.Parameter, FakeTensor)


class Adapter(NamedTuple):
    """One adapter's operands; lora_A (R, K), lora_B (N, R), lora_bias (N,)."""

    lora_A: Tensor
    lora_B: Tensor
    lora_bias: Tensor | None
    scaling: float
    dropout_p: float


class Product(NamedTuple):
    """``x @ weight.T + bias``: weight (N, K), bias (N,)."""

    weight: Tensor
    bias: Tensor | None


def read_product(base: nn.Module) -> Product | str:
    """Returns the operands of a base layer that is a plain product, or why it is none."""
    kind = type(base)
    if kind is not nn.Linear and kind is not Conv1D:
        return f"its base is a {kind.__module__}.{kind.__qualname__}"
    weight, bias = _get_tensor(base, "weight"), _get_tensor(base, "bias")
    if weight is None:
        return "its base has no weight"
    if weight.dtype not in FLOATS:
        return f"its base's weight is {weight.dtype}"
    if bias is not None and bias.dtype != weight.dtype:
        return f"its base's weight is {weight.dtype}, its bias {bias.dtype}"
    return Product(weight if kind is nn.Linear else weight.t(), bias)


def read_adapter(layer: nn.Module, name: str) -> Adapter:
    """Reads the present operands of adapter ``name`` of the layer."""
    modules: Any = layer._modules
    A = _get_tensor(modules["lora_A"]._modules[name], "weight")
    B, bias = (_get_tensor(modules["lora_B"]._modules[name], each) for each in ("weight", "bias"))
    dropout, scaling = modules["lora_dropout"]._modules[name], vars(layer)["scaling"][name]
    p = dropout.p if type(dropout) is nn.Dropout and dropout.training else 0.0
    if isinstance(scaling, Tensor):
        # A number on the device, which is not waited for.
        return Adapter(A, B * scaling, None if bias is None else bias * scaling, 1.0, p)
    return Adapter(A, B, bias, float(scaling), p)


def explain_obstacle(
    layer: Any, names: Iterable[str], dtype: torch.dtype | None = None
) -> str | None:
    """Says why PEFT's own forward has to run for the adapters ``names``; None where it need not.

    dtype: the input's, where there is one.
    """
    if every_module._has_any_global_hook():
        return "hooks on every module are registered"
    # A layer asks this at each call: attributes of modules are looked up past their __getattr__.
    modules = layer._modules
    reason = _explain_hooks(modules["base_layer"])
    if reason is not None:
        return f"its base_layer {reason}"
    for name in names:
        for part in ("lora_A", "lora_B", "lora_dropout"):
            reason = _explain_hooks(modules[part]._modules[name])
            if reason is not None:
                return f"{part} of adapter {name!r} {reason}"
        reason = explain_unknown(layer, name)
        if reason is not None:
            return reason
        kind = type(modules["lora_dropout"]._modules[name])
        if kind is not nn.Identity and kind is not nn.Dropout:
            return f"lora_dropout of adapter {name!r} is a {kind.__module__}.{kind.__qualname__}"
        if not layer.cast_input_dtype_enabled:
            if _get_tensor(modules["lora_A"]._modules[name], "weight").dtype != dtype:
                return "casting of inputs is disabled"
    return None


def explain_unknown(layer: Any, name: str) -> str | None:
    """Says why an adapter's matrices, or the base's, are not plain; None where they are."""
    modules = layer._modules
    # Other layers than this one have a base that is quantized, and computes its own output.
    if isinstance(layer, lora.Linear):
        reason = _explain_unreadable(modules["base_layer"])
        if reason is not None:
            return f"its base_layer {reason}"
    if name in layer.lora_variant:
        return f"adapter {name!r} is a {type(layer.lora_variant[name]).__name__}"
    dtypes = []
    for part in ("lora_A", "lora_B"):
        module = modules[part]._modules[name]
        kind = type(module)
        reason = _explain_unreadable(module)
        if kind is not nn.Linear:
            reason = f"is a {kind.__module__}.{kind.__qualname__}"
        if reason is not None:
            return f"{part} of adapter {name!r} {reason}"
        dtypes.append(_get_tensor(module, "weight").dtype)
    if dtypes[0] is not dtypes[1] or dtypes[0] not in FLOATS:
        return f"lora_A of adapter {name!r} is {dtypes[0]}, its lora_B {dtypes[1]}"
    return None


def _explain_hooks(part: Any) -> str | None:
    """Says why a part has to be called; None where it need not."""
    if part._forward_hooks or part._forward_pre_hooks:
        return "has hooks"
    if part._backward_hooks or part._backward_pre_hooks:
        return "has hooks"
    return "has a forward of its own" if "forward" in part.__dict__ else None


def _explain_unreadable(part: Any) -> str | None:
    """Says what is not a plain matrix or vector in a part's weight or bias."""
    parameters = part._parameters
    for name, dims in (("weight", 2), ("bias", 1)):
        tensor = parameters.get(name)
        if tensor is None:
            continue
        if type(tensor) not in _DENSE:
            return f"has a {name} of type {type(tensor).__name__}"
        if tensor.layout is not torch.strided:
            return f"has a {name} of layout {tensor.layout}"
        if tensor.dim() != dims:
            return f"has a {name} of shape {tuple(tensor.shape)}, a shard?"
    return None


def concatenate(adapters: Sequence[Adapter]) -> list[Adapter]:
    """Joins adapters that every row takes into one of all their ranks, whose sum is rounded once.

    Returns them as they are where each has a dropout mask of its own, or their dtypes differ.
    """
    dtypes = {a.lora_A.dtype for a in adapters}
    if len(adapters) == 1 or len(dtypes) > 1 or any(a.dropout_p for a in adapters):
        return list(adapters)
    biases = [a.lora_bias * a.scaling for a in adapters if a.lora_bias is not None]
    A = torch.cat([a.lora_A for a in adapters])
    B = torch.cat([a.lora_B * a.scaling for a in adapters], dim=1)
    bias = torch.stack(biases).sum(0) if biases else None
    return [Adapter(A, B, bias, 1.0, 0.0)]


def _get_tensor(part: nn.Module, name: str) -> Any:
    """Returns a part's weight or bias; ``nn.DataParallel``'s replicas have plain attributes."""
    parameters = part._parameters
    return parameters[name] if name in parameters else getattr(part, name, None)


def is_dense(t: Tensor) -> bool:
    """Whether a tensor is plain memory: no DTensor, no quantized weight, not sparse or nested."""
    return type(t) in _DENSE and t.layout is torch.strided and not t.is_nested
