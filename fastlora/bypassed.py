"""Layers whose weight another module reads in its forward, without calling them.

What an adapter adds there is never computed: it does nothing, and gets no gradient.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from torch import nn

from fastlora.sources import ANY, Path, uses_of


class Reader(NamedTuple):
    """A module above a layer, which computes with its weight in a method.

    called: whether it, or another, also calls the layer, or hands it to who may.
    """

    module: nn.Module
    method: str
    called: bool


def bypassed(model: nn.Module, names: Iterable[str]) -> str | None:
    """Why a layer of ``model``, known under ``names``, would not be called by who reads it."""
    for name in names:
        parent_name, _, child = name.rpartition(".")
        parent = model.get_submodule(parent_name)
        if isinstance(parent, nn.MultiheadAttention):
            return "nn.MultiheadAttention reads its weight and never calls it"
        if isinstance(parent, nn.TransformerEncoderLayer) and child in ("linear1", "linear2"):
            return "nn.TransformerEncoderLayer's fast path reads its weight and does not call it"
        found = reader(model, name)
        if found is not None and not found.called:
            kind = type(found.module).__qualname__
            return f"{kind}.{found.method} reads its weight and never calls it"
    return None


def reader(model: nn.Module, name: str) -> Reader | None:
    """Who computes with the weight of the layer ``name``, as the modules above it are written."""
    parts = name.split(".")
    found, called, module = None, False, model
    for depth, part in enumerate(parts):
        # A forward of its own, on the instance, says nothing of the class's.
        uses = None if "forward" in vars(module) else uses_of(type(module))
        if uses is not None:
            path = tuple(parts[depth:])
            for read, method in uses.read.items():
                if found is None and _fits(read, path):
                    found = module, method
            called = called or any(_fits(one, path) for one in uses.called)
            for one in uses.handed:
                # Modules hand themselves on all the time; who holds the layer may do it for that.
                called = called or (_fits(one, path[: len(one)]) and (one != () or len(path) == 1))
        module = getattr(module, part)
    return None if found is None else Reader(*found, called)


def _fits(pattern: Path, path: Path) -> bool:
    return len(pattern) == len(path) and all(
        wanted in (ANY, part) for wanted, part in zip(pattern, path, strict=True)
    )
