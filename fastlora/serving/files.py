"""An adapter's files as a server reads them: all of it is for served layers, or it is refused."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from fastlora import adapter_files as files
from fastlora.checkpoint import adapter_shapes
from fastlora.config import LoRAConfig
from fastlora.listing import some
from fastlora.serving.layout import Factors


@dataclass(frozen=True)
class Reader:
    """Reads adapters for ``served`` layers, {name: (N, K)}, of a model with these ``linears``."""

    served: Mapping[str, tuple[int, int]]
    linears: frozenset[str]
    max_rank: int

    def read(self, directory: str | os.PathLike[str]) -> dict[str, Factors]:
        """The adapter in PEFT's files; ValueError or FileNotFoundError if it cannot be served."""
        config = files.read_config(directory)
        expected = {
            name: adapter_shapes(name, self.served[name], config) for name in self._targeted(config)
        }
        every = {key: shape for shapes in expected.values() for key, shape in shapes.items()}
        tensors = files.read_tensors(directory, every)
        found = {}
        for name, shapes in expected.items():
            A, B = (tensors[key] for key in shapes)
            found[name] = Factors(A, B, config.scaling_of(name))
        return found

    def _targeted(self, config: LoRAConfig) -> list[str]:
        """The served layers that an adapter is for, checked against its config."""
        config.check_plain("of adapters served beside each other none")
        named = {name for name in self.linears if config.names(name)}
        if config.all_linear:
            named &= self.served.keys()
        if not named or not named <= self.served.keys():
            found = some(named - self.served.keys()) or "no layer at all"
            raise ValueError(
                f"target_modules: the adapter is for {found}, which is not served here"
            )
        for name in named:
            if config.rank_of(name) > self.max_rank:
                raise ValueError(
                    f"{name}: expected a rank of at most {self.max_rank}, got "
                    f"{config.rank_of(name)}"
                )
        return sorted(named)


@dataclass(frozen=True)
class AdapterFiles:
    """An adapter in a folder, to be read now and, where it has had to make room, again."""

    directory: str
    reader: Reader

    def __call__(self) -> dict[str, Factors]:
        return self.reader.read(self.directory)
