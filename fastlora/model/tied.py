"""Weights that other modules read too: found, and given a copy of their own on request."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from fastlora.backends.merge_lists.undo import Undo
from fastlora.config.listing import list_some
from fastlora.functional.checks.merge import overlap
from fastlora.inspection.layers import find_places
from fastlora.inspection.plain_tensors import is_plain
from fastlora.modules.layer import LoRALayer

_Layer = TypeVar("_Layer", bound=nn.Module)


def find_tied(model: nn.Module, layers: Iterable[_Layer]) -> dict[_Layer, list[str]]:
    """Finds the layers whose weight shares elements with other parameters, and the names of those.

    Tied parameters and overlapping views count; slices of one storage that do not overlap are none.
    So do other places of a plain layer, which has no adapter there.
    """
    owners: dict[int, list[tuple[str, nn.Module, torch.Tensor]]] = {}
    for name, module in model.named_modules():
        # Buffers too: what reads one would change as well.
        for kind, parameter in (*module._parameters.items(), *module._buffers.items()):
            if parameter is not None and parameter.numel():
                owners.setdefault(_find_memory(parameter), []).append(
                    (f"{name}.{kind}", module, parameter)
                )
    names_of_tied, elsewhere = {}, find_places(model)
    for layer in layers:
        weight = layer._parameters["weight"]
        assert weight is not None
        sharing = owners.get(_find_memory(weight), [])
        others = [
            name
            for name, module, parameter in sharing
            if module is not layer
            and (parameter is weight or overlap(parameter.detach(), weight.detach()))
        ]
        if not getattr(layer, "holds_lora", False):
            others += [f"{name}.weight" for name in elsewhere.get(layer, ([], []))[1]]
        if others:
            names_of_tied[layer] = others
    return names_of_tied


def _find_memory(parameter: torch.Tensor) -> int:
    # Of a subclass that wraps others (quantized, say) there is no storage, only the object.
    return parameter.untyped_storage().data_ptr() if is_plain(parameter) else -id(parameter)


def refuse_tied(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    remedy: str = "exclude the layer, or merge with untie=True to give it a copy",
) -> None:
    """Raises RuntimeError, with the remedy, where merging into ``layers`` would change others."""
    names_of_tied = find_tied(model, layers.values())
    for name, layer in layers.items():
        if layer in names_of_tied:
            raise RuntimeError(
                f"{name}: its weight is tied with {list_some(names_of_tied[layer])}, which "
                f"merging would change too; {remedy}"
            )


def _find_tying_configs(model: nn.Module) -> list[Any]:
    """Finds a transformers model's config, and its text model's, where they tie the embeddings."""
    config = getattr(model, "config", None)
    configs = (config, getattr(config, "text_config", None))
    return [each for each in configs if getattr(each, "tie_word_embeddings", False) is True]


def note_untied(model: nn.Module, undo: Undo) -> None:
    """Has the config say so where the embeddings no longer share a weight."""
    ends = [getattr(model, f"get_{end}_embeddings", lambda: None)() for end in ("input", "output")]
    weights = [getattr(end, "weight", None) for end in ends]
    if None not in weights and weights[0] is not weights[1]:
        _set_tying(_find_tying_configs(model), undo)


def untie(model: nn.Module, layers: dict[str, LoRALayer], undo: Undo) -> None:
    """Gives each of ``layers`` that is tied a weight of its own; ``undo`` ties them again."""
    untied = find_tied(model, layers.values())
    for layer, others in untied.items():
        own = layer.weight.detach().clone()
        undo.push(_tie, layer, layer._parameters["weight"])
        layer.weight = nn.Parameter(own, requires_grad=layer.weight.requires_grad)
        layer.untied = tuple(others)
    if untied:
        # Or tie_weights(), and whoever reads the saved config, would tie them again.
        _set_tying(_find_tying_configs(model), undo)


def _tie(layer: LoRALayer, weight: nn.Parameter) -> None:
    layer._parameters["weight"] = weight  # the same object, so tied again
    layer.untied = ()


def _set_tying(configs: list[Any], undo: Undo) -> None:
    """Has ``configs``, which tie the embeddings, say that they are not tied."""
    for config in configs:
        undo.push(setattr, config, "tie_word_embeddings", True)
        config.tie_word_embeddings = False
