"""Reasons in a model's code against merging a layer's adapter, which its files do not show.

The installed transformers is asked where config.json names one of its classes; code of others is
not run, and nothing is known about it.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from fastlora.config.listing import list_some
from fastlora.inspection.bypass import explain_bypass
from fastlora.inspection.layers import find_places
from fastlora.merge_files.adapters import AdapterFolder
from fastlora.merge_files.layer_lookup import Places
from fastlora.merge_files.renaming import build_on_meta
from fastlora.merge_files.shards import Checkpoint


def explain_unfit(base: Checkpoint, adapter: AdapterFolder, its_places: Places) -> dict[str, str]:
    """Says which of the adapter's layers must not be merged into the base's files, and why.

    Layers that the model never calls, though it reads their weights: their adapters have had no
    part in it. Layers whose weight has several places in the model, one with the adapter, and one
    place in the files. Adapters that add nothing pass, and output layers, which the files show.
    its_places: where its layers are in the files.
    """
    names = [
        name
        for name, layer in adapter.layers.items()
        if layer.lora_bias is not None or bool(layer.lora_B.any())
    ]
    if not _is_worth_building(base, names):
        return {}
    try:
        model = build_on_meta(base)
    except LookupError:
        return {}
    reasons, by_module, holders = {}, find_places(model), _group_by_weight(model)
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    modules = dict(model.named_modules(remove_duplicate=False))
    for name in names:
        place, moved = its_places.of(name), its_places.moved(name)
        candidates = (name, moved, place, prefix + place, place.removeprefix(prefix))
        module_name = next((each for each in candidates if each in modules), None)
        if module_name is None:
            continue
        module = modules[module_name]
        module_names = by_module[module][0]
        reason = explain_bypass(model, module_names)
        if reason is not None:
            reasons[name] = f"{reason}, so the adapter has had no part in the model"
            continue
        others = holders.get(id(getattr(module, "weight", None)), set()) - set(module_names)
        files = {other: its_places.files.get(other, other) for other in others}
        others = {other for other, file in files.items() if f"{file}.weight" not in base.holder}
        if others and module is not model.get_output_embeddings():  # pyright: ignore
            names = list_some(others)
            reasons[name] = f"its weight is also that of {names}, which would change too"
    return reasons


def _group_by_weight(model: nn.Module) -> dict[int, set[str]]:
    """Groups module names by the identity of their weight, as meta tensors have no memory."""
    names: dict[int, set[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module._parameters.get("weight")), set()).add(name)
    return names


def _is_worth_building(base: Checkpoint, names: list[str]) -> bool:
    """Whether the model's code may contain such layers: most has none, and is not built."""
    spec = importlib.util.find_spec("transformers")
    if spec is None or not spec.submodule_search_locations or not names:
        return False
    ends = "|".join(sorted({re.escape(name.rpartition(".")[2]) for name in names}))
    parts = {part for name in names for part in name.split(".")}
    read = re.compile(rf"\.({ends})\.weight\b(?!\.(dtype|device))")
    folder = Path(next(iter(spec.submodule_search_locations))) / "models"
    for kind in _list_model_types(base.config):
        for file in sorted((folder / kind.replace("-", "_")).glob("modeling_*.py")):
            text = file.read_text(encoding="utf-8")
            lines = [line for line in text.splitlines() if "init" not in line]
            if any(map(read.search, lines)):
                return True
            # Lists whose members are one module are tied by their numbers.
            if parts & set(re.findall(r'"\^?(\w+)\.[^"\s]*\\d[^"\s]*"\s*:', text)):
                return True
    return False


def _list_model_types(config: Any) -> Iterator[str]:
    if isinstance(config, dict):
        if isinstance(config.get("model_type"), str):
            yield config["model_type"]
        for value in config.values():
            yield from _list_model_types(value)
