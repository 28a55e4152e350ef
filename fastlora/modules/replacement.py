"""One module in the place of another: where it goes, and what it takes over."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from fastlora.inspection.wrappers import unwrap


def replace_module(model: nn.Module, names: Iterable[str], layer: nn.Module) -> None:
    """Puts ``layer`` where ``model`` has a module under each of ``names``."""
    for name in names:
        parent, _, child = name.rpartition(".")
        setattr(unwrap(model).get_submodule(parent), child, layer)


def adopt(layer: nn.Module, linear: nn.Module, without: frozenset[str] = frozenset()) -> None:
    """Gives ``layer`` the weight, bias, mode, hooks and further attributes of ``linear``."""
    layer.weight, layer.bias = linear.weight, linear.bias
    for name, value in linear.__dict__.items():
        is_taken = name == "training" or "_hook" in name or name not in layer.__dict__
        if is_taken and name not in without:
            layer.__dict__[name] = value
