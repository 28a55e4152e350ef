"""Names that transformers gives a checkpoint's layers while it loads them."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from fastlora.merge_files import loaded_names
from fastlora.merge_files.shards import Checkpoint

_WEIGHT = ".weight"


class NotInstalled(LookupError):
    """There is no transformers to ask."""


@dataclass(frozen=True)
class Renaming:
    """Names of the model's layers. model: on the meta device. files: the base's name of each layer.

    made: sources of each layer whose weight the files do not have as the model has it; twice: names
    of the weights of each layer that the files have several for.
    """

    model: nn.Module
    files: dict[str, str]
    made: dict[str, list[str]]
    twice: dict[str, list[str]]

    def translate_old(self, layers: Iterable[str]) -> dict[str, str]:
        """Returns the model's names of layers that have a checkpoint's, as far as it has them.

        Adapters trained with an older transformers, which did not rename, have such names.
        """
        names = loaded_names.look_up_names(self.model, [layer + _WEIGHT for layer in layers]).names
        return {old.removesuffix(_WEIGHT): new.removesuffix(_WEIGHT) for old, new in names.items()}


def is_composite(base: Checkpoint) -> bool:
    """Whether the model has inner models, whose names transformers may change."""
    inner = [value for value in base.config.values() if isinstance(value, dict)]
    return any("model_type" in value for value in inner) or any(
        isinstance(base.config.get(name), dict) for name in ("text_config", "vision_config")
    )


def read(base: Checkpoint) -> Renaming:
    """Reads the names from the installed transformers; LookupError says why that fails."""
    model = build_on_meta(base)
    loaded = loaded_names.look_up_names(model, base.holder)
    computed = dict(loaded.made)
    by_layer: dict[str, list[str]] = {}
    for file, name in loaded.names.items():
        if name.endswith(_WEIGHT):
            if file.endswith(_WEIGHT):
                by_layer.setdefault(name, []).append(file)
            else:
                computed.setdefault(name, []).append(file)
    layers = {name.removesuffix(_WEIGHT): sorted(files) for name, files in by_layer.items()}
    return Renaming(
        model,
        {layer: files[0].removesuffix(_WEIGHT) for layer, files in layers.items()},
        {name.removesuffix(_WEIGHT): sorted(files) for name, files in computed.items()},
        {layer: files for layer, files in layers.items() if len(files) > 1},
    )


def build_on_meta(base: Checkpoint) -> nn.Module:
    """Builds the base's model without its weights, of the class that its config names.

    LookupError where transformers is missing, does not know it or cannot build it.
    """
    try:
        transformers = importlib.import_module("transformers")
    except ImportError:
        raise NotInstalled(
            "transformers, which changes the names of some models' tensors while it loads them, "
            "is not installed: with it fastlora looks them up"
        ) from None
    library = f"transformers {transformers.__version__}"
    names = base.config.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    kind = getattr(transformers, name, None) if isinstance(name, str) else None
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise LookupError(
            f"{library} has no model of architectures={names} to ask how it is written"
        )
    try:
        config = transformers.AutoConfig.from_pretrained(
            base.folder, local_files_only=True, trust_remote_code=False
        )
        initialization = importlib.import_module("transformers.initialization")
        with torch.device("meta"), initialization.meta_device_safe_creation_ops():
            return kind(config)
    except Exception as error:  # whatever a model's code finds wrong with a config
        raise LookupError(
            f"{library} cannot build {name} to ask how it is written: {error}"
        ) from None
