"""Layers whose weight another module reads in its forward, without calling them, or changes.

What an adapter adds there is never computed: it does nothing, and gets no gradient. Or it is not
what it was, where a forward rescales the weight beside it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from torch import nn

from fastlora.inspection.sources import ANY, Path, Uses, read_uses

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


class Reader(NamedTuple):
    """A module above a layer, which computes with its weight in a method.

    called: whether it, or another, also calls the layer, or hands it to code that may.
    """

    module: nn.Module
    method: str
    called: bool


def explain_bypass(model: nn.Module, names: Iterable[str]) -> str | None:
    """Says why a layer of ``model``, known under ``names``, would be read and not called."""
    for name in names:
        parent_name, _, child = name.rpartition(".")
        parent = model.get_submodule(parent_name)
        if isinstance(parent, nn.MultiheadAttention):
            return "nn.MultiheadAttention reads its weight and never calls it"
        if isinstance(parent, nn.TransformerEncoderLayer) and child in ("linear1", "linear2"):
            return "nn.TransformerEncoderLayer's fast path reads its weight and does not call it"
        reader = find_reader(model, name)
        if reader is not None and not reader.called:
            kind = type(reader.module).__qualname__
            return f"{kind}.{reader.method} reads its weight and never calls it"
    return None


def explain_rescaling(model: nn.Module, names: Iterable[str]) -> str | None:
    """Names a forward above a layer that changes its weight in place, and not its adapter."""
    for name in names:
        parts = tuple(name.split("."))
        for depth, module in enumerate(_list_above(model, parts)):
            uses = _read_uses(module)
            for changed, method in (uses.changed if uses else {}).items():
                if _fits(changed, parts[depth:]):
                    kind = type(module).__qualname__
                    return f"{kind}.{method} changes its weight in place, and not its adapter"
    return None


def find_reader(model: nn.Module, name: str) -> Reader | None:
    """Finds the module that computes with the weight of the layer ``name``, by its source."""
    parts = tuple(name.split("."))
    read_in, called, above = None, False, _list_above(model, parts)
    for depth, module in enumerate(above):
        uses, path = _read_uses(module), parts[depth:]
        if uses is None:
            continue
        for read, method in uses.read.items():
            if read_in is None and _fits(read, path):
                read_in = module, method
        called = called or any(_fits(pattern, path) for pattern in (*uses.called, *uses.handed))
        if len(path) == 1 or (len(path) == 2 and isinstance(above[-1], _CONTAINERS)):
            # Code that is given all that holds the layer may call it.
            called = called or any(_fits(pattern, path[:-1]) for pattern in uses.handed)
    return None if read_in is None else Reader(*read_in, called)


def _list_above(model: nn.Module, parts: Path) -> list[nn.Module]:
    """Lists the modules above a layer, from the model to its parent."""
    modules = [model]
    for part in parts[:-1]:
        modules.append(getattr(modules[-1], part))
    return modules


def _read_uses(module: nn.Module) -> Uses | None:
    # A forward of its own, on the instance, says nothing of the class's; PEFT's only pass calls on.
    is_other = "forward" in vars(module) or type(module).__module__.startswith("peft.")
    return None if is_other else read_uses(type(module))


def _fits(pattern: Path, path: Path) -> bool:
    return len(pattern) == len(path) and all(
        expected in (ANY, part) for expected, part in zip(pattern, path, strict=True)
    )
