"""Reads adapters for a server: all of an adapter is for served layers, or it is refused."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, nn

from fastlora.adapters import base_copies, files
from fastlora.adapters import in_memory as adapter_tensors
from fastlora.adapters.stored import InMemory, find_differing_rows
from fastlora.config import LoRAConfig
from fastlora.config.listing import list_some
from fastlora.model.adapter_tensors import list_adapter_shapes
from fastlora.serving.bank.layout import Factors

# The end of an error: what to do with an adapter that changes the base.
_FIXED = (
    "and the served base is everybody's: serve a model that it is merged into (fastlora merge), or "
    "load it into a model of its own (load_adapter)"
)


@dataclass(frozen=True)
class Reader:
    """A reader of adapters for ``served`` layers {name: (N, K)} of a model with ``linears``."""

    model: nn.Module
    served: Mapping[str, tuple[int, int]]
    linears: frozenset[str]
    max_rank: int
    # Files compared with the base: their state then, and which tensors are copies of its weights.
    _compared: dict[Path, tuple[tuple[int, ...], frozenset[str]]] = field(default_factory=dict)

    def read(self, directory: str | os.PathLike[str]) -> dict[str, Factors]:
        """Reads PEFT's files; ValueError or FileNotFoundError if the adapter cannot be served."""
        config = files.read_config(directory)
        return self._read_factors(
            config,
            lambda shapes: files.read_tensors(
                directory, shapes, self._find_copies(directory, shapes)
            ),
        )

    def take(self, tensors: Mapping[str, Tensor], config: object) -> dict[str, Factors]:
        """Copies an adapter's tensors, by PEFT's names, to the CPU; they are checked as files are.

        config: a LoRAConfig, PEFT's, or the fields of its file. Raises TypeError or ValueError.
        """
        by_name = adapter_tensors.index_by_name(tensors)
        settings = adapter_tensors.resolve_config(config, adapter_tensors.read_shapes(by_name))
        return self._read_factors(
            settings,
            lambda shapes: adapter_tensors.copy_expected(
                by_name, shapes, self._find_held_copies(by_name, shapes)
            ),
        )

    def _read_factors(
        self, config: LoRAConfig, read: Callable[[Mapping[str, files.Shape]], Mapping[str, Tensor]]
    ) -> dict[str, Factors]:
        expected = {
            name: list_adapter_shapes(name, self.served[name], config)
            for name in self._find_targets(config)
        }
        every = {key: shape for shapes in expected.values() for key, shape in shapes.items()}
        tensors, factors = read(every), {}
        for name, shapes in expected.items():
            A, B = (tensors[key] for key in shapes)
            factors[name] = Factors(A, B, config.scaling_of(name))
        return factors

    def _find_copies(
        self, directory: str | os.PathLike[str], expected: Mapping[str, files.Shape]
    ) -> frozenset[str]:
        """Finds names of the base's weights in the file; ValueError where it has other numbers."""
        if files.read_shapes(directory).keys() <= expected.keys():
            return frozenset()
        path = Path(directory, files.WEIGHTS_NAME)
        status = path.stat()
        state = status.st_ino, status.st_size, status.st_mtime_ns
        compared = self._compared.get(path)
        # Once a state: an adapter that has had to make room is read often.
        if compared is None or compared[0] != state:
            copies = base_copies.read(directory, self.model, self.served, expected, fixed=_FIXED)
            compared = self._compared[path] = state, copies.names
        return compared[1]

    def _find_held_copies(
        self, tensors: Mapping[str, Tensor], expected: Mapping[str, files.Shape]
    ) -> frozenset[str]:
        """``_find_copies`` among tensors in memory."""
        bases = base_copies.find_base_tensors(self.model, self.served, {})
        copies = tensors.keys() & bases.keys() - expected.keys()
        for name in copies:
            base, copy = bases[name], tensors[name]
            alike = copy.shape == base.shape
            rows = (
                find_differing_rows(InMemory(copy), lambda i, j, base=base: base[i:j])
                if alike
                else None
            )
            if rows is not None or not alike:
                changed = base_copies.describe_own_rows(base_copies.strip_peft_wrappers(name), rows)
                raise ValueError(f"tensors: {changed}, {_FIXED}")
        return frozenset(copies)

    def _find_targets(self, config: LoRAConfig) -> list[str]:
        """Finds the served layers that an adapter is for, and checks its config for them."""
        config.check_plain("of adapters served beside each other none")
        targets = {name for name in self.linears if config.names(name)}
        if config.all_linear:
            targets &= self.served.keys()
        if not targets or not targets <= self.served.keys():
            others = list_some(targets - self.served.keys()) or "no layer at all"
            raise ValueError(
                f"target_modules: the adapter is for {others}, which is not served here"
            )
        for name in targets:
            if config.rank_of(name) > self.max_rank:
                raise ValueError(
                    f"{name}: expected a rank of at most {self.max_rank}, got "
                    f"{config.rank_of(name)}"
                )
        return sorted(targets)


@dataclass(frozen=True)
class AdapterFiles:
    """An adapter in a folder: read now, and again when its copy has made room for others."""

    directory: str
    reader: Reader

    def __call__(self) -> dict[str, Factors]:
        return self.reader.read(self.directory)


@dataclass(frozen=True)
class AdapterSource:
    """An adapter that a function reads, now and again when its copy has made room for others."""

    source: Callable[[], tuple[Mapping[str, Tensor], object]]
    reader: Reader

    def __call__(self) -> dict[str, Factors]:
        return self.reader.take(*self.source())


@dataclass(frozen=True)
class AdapterTensors:
    """An adapter that came as tensors: kept in memory, since it cannot be read again."""

    factors: dict[str, Factors]

    def __call__(self) -> dict[str, Factors]:
        return self.factors
