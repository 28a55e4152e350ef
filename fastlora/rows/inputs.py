"""Inputs of a call, and which of them are the batch."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from fastlora.inspection.wrappers import unwrap

# Inputs of a model that have the batch first, by the contract of its callers.
_BATCH_NAMES = (
    "input_ids",
    "inputs_embeds",
    "inputs",
    "decoder_input_ids",
    "decoder_inputs_embeds",
    "labels",
    "encoder_hidden_states",
    "encoder_outputs",
    "hidden_states",
    "hidden_state",
    "x",
    "input",
)


class Inputs:
    """Inputs of the modules of one model."""

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self._parameters: dict[type, list[str]] = {}

    def bind(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        if not args:
            return kwargs
        names = self._list_parameters(module)
        names = [*names[: len(args)], *(f"*{i}" for i in range(len(names), len(args)))]
        return dict(zip(names, args, strict=True)) | kwargs

    def _list_parameters(self, module: nn.Module) -> list[str]:
        kind = type(module)
        names = self._parameters.get(kind)
        if names is None:
            names = self._parameters[kind] = list(inspect.signature(kind.forward).parameters)[1:]
        return names

    def find_batch(self, module: nn.Module, inputs: dict[str, Any]) -> list[Any]:
        """Finds the inputs that are the batch, the main one first."""
        names = [getattr(self.root, "main_input_name", None)]
        if module is find_encoder(self.root):
            names.append(getattr(module, "main_input_name", None))
        candidates = [name for name in dict.fromkeys([*names, *_BATCH_NAMES]) if name is not None]
        batch = [inputs[name] for name in candidates if inputs.get(name) is not None]
        # A part of a model of transformers may be given images, which are no rows of its batch.
        if batch or (names[0] in self._list_parameters(self.root)):
            return batch
        first = next((t for t in inputs.values() if isinstance(t, Tensor) and t.dim()), None)
        return [] if first is None else [first]


def find_encoder(root: nn.Module) -> nn.Module | None:
    """Finds the module that ``generate`` calls before the model."""
    config = getattr(root, "config", None)
    if not getattr(config, "is_encoder_decoder", False) or not hasattr(root, "get_encoder"):
        return None
    encoder = root.get_encoder()  # pyright: ignore[reportCallIssue]
    return encoder if isinstance(encoder, nn.Module) and encoder is not root else None


def count_copies(model: nn.Module, options: Mapping[str, Any]) -> int:
    """Counts the neighbours ``generate`` makes of a row: its beams, or the texts it returns."""
    config = options.get("generation_config") or getattr(unwrap(model), "generation_config", None)
    names = ("num_beams", "num_return_sequences")
    return max(options.get(name) or getattr(config, name, None) or 1 for name in names)
