"""Taking the place of a module: what can be replaced, and what its replacement inherits."""

from __future__ import annotations

import torch
from torch import nn

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def unsupported(module: nn.Module) -> str | None:
    """Why ``module`` cannot be wrapped, or None for a plain ``nn.Linear``."""
    kind = type(module)
    if getattr(module, "holds_lora", False):
        return f"it is a {kind.__name__} already"
    if kind is not nn.Linear:
        sub = (
            "a subclass of nn.Linear with behaviour of its own"
            if isinstance(module, nn.Linear)
            else "not an nn.Linear"
        )
        return f"{kind.__module__}.{kind.__qualname__} is {sub}"
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance (an offloading hook?)"
    if "weight" not in module._parameters:
        return "its weight is computed (weight_norm, spectral_norm?), not a parameter"
    extra = {*module._parameters, *module._buffers, *module._modules} - {"weight", "bias"}
    if extra:
        return f"it holds more than a weight and a bias: {', '.join(sorted(extra))}"
    if module.weight.dtype not in _DTYPES:
        return f"its weight is {module.weight.dtype}"
    return None


def lora_dtype_for(base: torch.dtype) -> torch.dtype:
    """PEFT's choice: float32 adapters on a half-precision base, the base's dtype otherwise."""
    return torch.float32 if base in (torch.float16, torch.bfloat16) else base


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside ``torch.compile``'s and ``DistributedDataParallel``'s wrappers."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    while True:
        # By its attribute: naming torch.compile's class would import all of the compiler.
        inner = model._modules.get("_orig_mod")
        if inner is None and isinstance(model, nn.parallel.DistributedDataParallel):
            inner = model.module
        if inner is None:
            return model
        model = inner


def adopt(layer: nn.Linear, linear: nn.Linear, without: frozenset[str] = frozenset()) -> None:
    """Gives ``layer`` the weight, bias, mode, hooks and further attributes of ``linear``."""
    layer.weight, layer.bias = linear.weight, linear.bias
    for name, value in linear.__dict__.items():
        wanted = name == "training" or "_hook" in name or name not in layer.__dict__
        if wanted and name not in without:
            layer.__dict__[name] = value
