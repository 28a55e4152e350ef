"""What a model's code says against merging a layer's adapter, which its files cannot say.

Asked of the transformers that is installed, where config.json names a class of its own; a class of
anybody else's is not run, and nothing is known of it.
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
from fastlora.merge_files.places import Places
from fastlora.merge_files.renaming import on_meta
from fastlora.merge_files.shards import Checkpoint


def unfit(base: Checkpoint, adapter: AdapterFolder, its_places: Places) -> dict[str, str]:
    """Of the adapter's layers those that must not be merged into the base's files, and why.

    Those that the model never calls, though it reads their weights: their adapters have had no part
    in it. Those whose weight it has in several places, of which one has the adapter, if the files
    have it once. Adapters that add nothing pass, and output
    layers, of which the files tell. its_places: where its layers are in the files.
    """
    names = [
        name
        for name, layer in adapter.layers.items()
        if layer.lora_bias is not None or bool(layer.lora_B.any())
    ]
    if not _worth_building(base, names):
        return {}
    try:
        model = on_meta(base)
    except LookupError:
        return {}
    found, by_module, holders = {}, find_places(model), _holders(model)
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    modules = dict(model.named_modules(remove_duplicate=False))
    for name in names:
        place, moved = its_places.of(name), its_places.moved(name)
        candidates = (name, moved, place, prefix + place, place.removeprefix(prefix))
        known = next((each for each in candidates if each in modules), None)
        if known is None:
            continue
        module = modules[known]
        own = by_module[module][0]
        reason = explain_bypass(model, own)
        if reason is not None:
            found[name] = f"{reason}, so the adapter has had no part in the model"
            continue
        others = holders.get(id(getattr(module, "weight", None)), set()) - set(own)
        files = {other: its_places.files.get(other, other) for other in others}
        others = {other for other, file in files.items() if f"{file}.weight" not in base.holder}
        if others and module is not model.get_output_embeddings():  # pyright: ignore
            found[name] = f"its weight is also that of {list_some(others)}, which would change too"
    return found


def _holders(model: nn.Module) -> dict[int, set[str]]:
    """By the weight's identity, for on meta no memory tells: all names of those that have it."""
    found: dict[int, set[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        found.setdefault(id(module._parameters.get("weight")), set()).add(name)
    return found


def _worth_building(base: Checkpoint, names: list[str]) -> bool:
    """Whether the text of the model's code has such a thing: most have none, and are not built."""
    spec = importlib.util.find_spec("transformers")
    if spec is None or not spec.submodule_search_locations or not names:
        return False
    ends = "|".join(sorted({re.escape(name.rpartition(".")[2]) for name in names}))
    parts = {part for name in names for part in name.split(".")}
    read = re.compile(rf"\.({ends})\.weight\b(?!\.(dtype|device))")
    folder = Path(next(iter(spec.submodule_search_locations))) / "models"
    for kind in _model_types(base.config):
        for file in sorted((folder / kind.replace("-", "_")).glob("modeling_*.py")):
            text = file.read_text(encoding="utf-8")
            lines = [line for line in text.splitlines() if "init" not in line]
            if any(map(read.search, lines)):
                return True
            # Lists whose members are one module are tied by their numbers.
            if parts & set(re.findall(r'"\^?(\w+)\.[^"\s]*\\d[^"\s]*"\s*:', text)):
                return True
    return False


def _model_types(config: Any) -> Iterator[str]:
    if isinstance(config, dict):
        if isinstance(config.get("model_type"), str):
            yield config["model_type"]
        for value in config.values():
            yield from _model_types(value)
