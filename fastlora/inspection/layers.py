"""Linear layers of a model: which there are, where they are, and what keeps LoRA out of one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastlora.inspection.plain_tensors import explain_unreadable

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is transformers' ``Conv1D`` (of GPT-2), whose weight is (in, out_features).

    By its name, so that transformers need not be installed, let alone imported, to say no.
    """
    return any(map(_is_conv1d_class, type(module).__mro__))


def is_linear(module: nn.Module) -> bool:
    """Whether it multiplies by a weight: an ``nn.Linear``, a ``Conv1D``, or of a subclass."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def is_peft_layer(module: nn.Module) -> bool:
    """Whether it is a layer of PEFT's, around one of the base's."""
    return any(map(_is_peft_class, type(module).__mro__))


def find_peft_layers(model: nn.Module) -> list[str]:
    """Lists the names of layers into which PEFT has put an adapter; PEFT is not imported for it."""
    return [name for name, module in model.named_modules() if is_peft_layer(module)]


def find_places(model: nn.Module) -> dict[nn.Module, tuple[list[str], list[str]]]:
    """Finds each module's names in the first place where it is, and those in others.

    A place is an attribute of one parent, which may itself be reached by several names.
    """
    names: dict[nn.Module, tuple[list[str], list[str]]] = {}
    first: dict[nn.Module, tuple[nn.Module, str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if name:
            parent, _, child = name.rpartition(".")
            place = (model.get_submodule(parent), child)
            other = first.setdefault(module, place) != place
            names.setdefault(module, ([], []))[other].append(name)
    return names


def get_matrix(module: nn.Module) -> Tensor:
    """Returns a linear layer's weight as (out_features, in_features), the very one or a view."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.t() if is_conv1d(module) else weight


def explain_unsupported(module: nn.Module) -> str | None:
    """Says why ``module`` cannot be wrapped; None for a plain ``nn.Linear`` or ``Conv1D``."""
    kind = type(module)
    if getattr(module, "holds_lora", False):
        return f"it is a {kind.__name__} already"
    if kind is not nn.Linear and not _is_conv1d_class(kind):
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
        form = None if parameter is None else explain_unreadable(parameter)
        if form is not None:
            return (
                f"its {name} is {form}: dequantize it first, or keep the layer and add to its "
                "output (functional.lora_add_)"
            )
    if module.weight.dtype not in _DTYPES:
        return f"its weight is {module.weight.dtype}"
    return None


def choose_lora_dtype(base: torch.dtype, requested: torch.dtype | None = None) -> torch.dtype:
    """Chooses as PEFT does: float32 adapters on a half-precision base, else the base's dtype.

    Raises ValueError for a ``requested`` dtype that is not a floating one.
    """
    if requested is None:
        return torch.float32 if base in (torch.float16, torch.bfloat16) else base
    if not isinstance(requested, torch.dtype) or not requested.is_floating_point:
        raise ValueError(f"lora_dtype: expected a floating torch.dtype or None, got {requested!r}")
    return requested


def _is_peft_class(kind: type) -> bool:
    return kind.__name__ == "BaseTunerLayer" and kind.__module__.startswith("peft.")


def _is_conv1d_class(kind: type) -> bool:
    return kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.")
