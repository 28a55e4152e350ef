"""Memory of a model's forwards: where their layers saw the batch, to be looked up, not followed.

A forward whose inputs look like an earlier one's is not followed again where all layers saw the
batch's rows in order, unless the value of a tensor decided on somebody's rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from fastlora.rows.frame import Place
from fastlora.rows.repeatable import has_foreign_hooks, is_all_trusted, read_state
from fastlora.rows.signature import UnknownInput, drop_lengths, make_signature
from fastlora.rows.statements import Statement

_MOST = 256


class Verdicts:
    """Places where the layers of one model saw the batch, by what its forwards have in common."""

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self.by_key: dict[Any, dict[int, Place]] = {}
        # {key without lengths: (places of the last forward, places of two lengths that agreed)}
        self.by_key_without_lengths: dict[Any, tuple[Any, dict[int, Place] | None]] = {}
        self._is_all_trusted: bool | None = None
        self._are_reliable = True

    def __getstate__(self) -> dict[str, Any]:
        # Places are by the ids of modules, and a copy of the model has other modules.
        return vars(self) | {"by_key": {}, "by_key_without_lengths": {}}

    def make_key(
        self,
        module: nn.Module,
        owners: tuple[int, ...],
        inputs: dict[str, Any],
        statements: Mapping[int, Statement],
    ) -> Any:
        """Makes the key that forwards share which go the same way; None where nobody can tell."""
        if self._is_all_trusted is None:
            self._is_all_trusted = is_all_trusted(self.root)
        if not (self._is_all_trusted and self._are_reliable) or has_foreign_hooks(self.root):
            return None
        try:
            signature = make_signature(inputs)
        except UnknownInput:
            return None
        dims = tuple((i, statement.dim) for i, statement in statements.items())
        modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        return id(module), module.training, owners, dims, modes, signature

    def find(self, key: Any) -> dict[int, Place] | None:
        """Finds the places of a forward of this key, or of any length if two have agreed."""
        if places := self.by_key.get(key):
            return places
        return self.by_key_without_lengths.get((key[:-1], drop_lengths(key[-1])), (0, None))[1]

    def keep(self, key: Any, places: dict[int, Place]) -> None:
        """Remembers the places of a forward; of many the oldest are forgotten."""
        for memory in (self.by_key, self.by_key_without_lengths):
            while len(memory) >= _MOST:
                memory.pop(next(iter(memory)), None)
        self.by_key[key] = places
        loose = (key[:-1], drop_lengths(key[-1]))
        if loose[1] is not None:
            before, agreed = self.by_key_without_lengths.get(loose, (places, None))
            if loose in self.by_key_without_lengths:
                agreed = places if before == places else None
            self.by_key_without_lengths[loose] = (places, agreed)

    def distrust(self, places: dict[int, Place]) -> None:
        """Forgets places that did not hold: such calls are followed each time from now on."""
        for memory in (self.by_key, self.by_key_without_lengths):
            for key, value in list(memory.items()):
                if value is places or value == (places, places):
                    del memory[key]
        self._are_reliable = False

    def are_alike_when_compiled(self) -> bool:
        """Whether forwards are taken to go the same way once they are compiled."""
        return self._are_reliable and read_state(self.root) is not None
