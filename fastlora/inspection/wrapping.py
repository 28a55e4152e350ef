"""Taking the place of a module: what can be replaced, and what its replacement inherits."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

from fastlora.inspection.plain import unreadable

# Where wrappers keep the module that they wrap: torch.compile's, checkpoint_wrapper's, FSDP1's.
_WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
_Layer = TypeVar("_Layer", bound="SharedWeight")
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is transformers' ``Conv1D`` (of GPT-2), whose weight is (in, out_features).

    By its name, so that transformers need not be installed, let alone imported, to say no.
    """
    return any(map(_is_the_conv1d, type(module).__mro__))


def peft_layers(model: nn.Module) -> list[str]:
    """The names of the layers into which PEFT has put an adapter; PEFT is not imported for it."""
    return [name for name, module in model.named_modules() if is_pefts(module)]


def is_pefts(module: nn.Module) -> bool:
    """Whether it is a layer of PEFT's, around one of the base's."""
    return any(map(_is_pefts, type(module).__mro__))


def is_linear(module: nn.Module) -> bool:
    """Whether it multiplies by a weight: an ``nn.Linear``, a ``Conv1D``, or of a subclass."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def matrix_of(module: nn.Module) -> Tensor:
    """The weight of a linear layer as (out_features, in_features), the very one or a view."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.t() if is_conv1d(module) else weight


def unsupported(module: nn.Module) -> str | None:
    """Why ``module`` cannot be wrapped, or None for a plain ``nn.Linear`` or ``Conv1D``."""
    kind = type(module)
    if getattr(module, "holds_lora", False):
        return f"it is a {kind.__name__} already"
    if kind is not nn.Linear and not _is_the_conv1d(kind):
        base = "Conv1D" if is_conv1d(module) else "nn.Linear"
        sub = (
            f"a subclass of {base} with behaviour of its own"
            if is_linear(module)
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
    if hasattr(module.weight, "placements"):
        return "its weight is sharded over processes already: replace linears first, then shard"
    for name, parameter in module._parameters.items():
        found = None if parameter is None else unreadable(parameter)
        if found is not None:
            return (
                f"its {name} is {found}: dequantize it first, or keep the layer and add to its "
                "output (functional.lora_add_)"
            )
    if module.weight.dtype not in _DTYPES:
        return f"its weight is {module.weight.dtype}"
    return None


def lora_dtype_for(base: torch.dtype, asked: torch.dtype | None = None) -> torch.dtype:
    """PEFT's choice: float32 adapters on a half-precision base, the base's dtype otherwise.

    Raises ValueError for an ``asked`` dtype that is not a floating one.
    """
    if asked is None:
        return torch.float32 if base in (torch.float16, torch.bfloat16) else base
    if not isinstance(asked, torch.dtype) or not asked.is_floating_point:
        raise ValueError(f"lora_dtype: expected a floating torch.dtype or None, got {asked!r}")
    return asked


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside the wrappers of ``torch.compile``, data parallelism and checkpointing."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    while True:
        # By their attributes: naming torch.compile's class would import all of the compiler.
        wrapped = (model._modules.get(name) for name in _WRAPPED)
        inner = next((module for module in wrapped if module is not None), None)
        if inner is None and isinstance(model, nn.parallel.DistributedDataParallel):
            inner = model.module
        if inner is None:
            return model
        model = inner


def places(model: nn.Module) -> dict[nn.Module, tuple[list[str], list[str]]]:
    """Of each module of a model its names in the first place where it is, and those in others.

    A place is an attribute of one parent, which may itself be reached by several names.
    """
    found: dict[nn.Module, tuple[list[str], list[str]]] = {}
    first: dict[nn.Module, tuple[nn.Module, str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if name:
            parent, _, child = name.rpartition(".")
            place = (model.get_submodule(parent), child)
            other = first.setdefault(module, place) != place
            found.setdefault(module, ([], []))[other].append(name)
    return found


def plain_name(name: str) -> str:
    """A module's full name without the wrappers inside the model, which files know nothing of."""
    if not any(wrapped in name for wrapped in _WRAPPED):
        return name
    return ".".join(part for part in name.split(".") if part not in _WRAPPED)


def adopt(layer: nn.Module, linear: nn.Module, without: frozenset[str] = frozenset()) -> None:
    """Gives ``layer`` the weight, bias, mode, hooks and further attributes of ``linear``."""
    layer.weight, layer.bias = linear.weight, linear.bias
    for name, value in linear.__dict__.items():
        wanted = name == "training" or "_hook" in name or name not in layer.__dict__
        if wanted and name not in without:
            layer.__dict__[name] = value


class SharedWeight(nn.Linear):
    """Around a linear's weight, or a ``Conv1D``'s, which lies transposed."""

    holds_lora = True
    fan_in_fan_out = False

    @property
    def matrix(self) -> Tensor:
        """The weight as (out_features, in_features), the very one or a view of it."""
        return self.weight.t() if self.fan_in_fan_out else self.weight

    @classmethod
    def around(cls: type[_Layer], linear: nn.Module) -> _Layer:
        """A layer in ``linear``'s place; TypeError where it cannot be taken."""
        reason = unsupported(linear)
        if reason is not None:
            raise TypeError(f"linear: {reason}")
        N, K = matrix_of(linear).shape
        layer = cls(K, N, bias=False, device="meta")
        adopt(layer, linear)
        layer.fan_in_fan_out = is_conv1d(linear)
        return layer


def _is_pefts(kind: type) -> bool:
    return kind.__name__ == "BaseTunerLayer" and kind.__module__.startswith("peft.")


def _is_the_conv1d(kind: type) -> bool:
    return kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.")
