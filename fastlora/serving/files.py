"""An adapter as a server reads it: all of it is for served layers, or it is refused."""

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

# What to do about an adapter that changes what is not an adapter's.
_FIXED = (
    "and the served base is everybody's: serve a model that it is merged into (fastlora merge), or "
    "load it into a model of its own (load_adapter)"
)


@dataclass(frozen=True)
class Reader:
    """Reads adapters for ``served`` layers, {name: (N, K)}, of ``model`` with these ``linears``."""

    model: nn.Module
    served: Mapping[str, tuple[int, int]]
    linears: frozenset[str]
    max_rank: int
    # Files that have been compared with the base: what identifies each, and its copies' names.
    _compared: dict[Path, tuple[tuple[int, ...], frozenset[str]]] = field(default_factory=dict)

    def read(self, directory: str | os.PathLike[str]) -> dict[str, Factors]:
        """The adapter in PEFT's files; ValueError or FileNotFoundError if it cannot be served."""
        config = files.read_config(directory)
        return self._factors(
            config,
            lambda shapes: files.read_tensors(directory, shapes, self._copies(directory, shapes)),
        )

    def take(self, tensors: Mapping[str, Tensor], config: object) -> dict[str, Factors]:
        """Copies, on the CPU, of an adapter's tensors by PEFT's names, which are checked as files'.

        config: a LoRAConfig, PEFT's, or the fields of its file. Raises TypeError or ValueError.
        """
        given = adapter_tensors.index_by_name(tensors)
        settings = adapter_tensors.resolve_config(config, adapter_tensors.read_shapes(given))
        return self._factors(
            settings,
            lambda shapes: adapter_tensors.copy_expected(
                given, shapes, self._held_copies(given, shapes)
            ),
        )

    def _factors(
        self, config: LoRAConfig, read: Callable[[Mapping[str, files.Shape]], Mapping[str, Tensor]]
    ) -> dict[str, Factors]:
        expected = {
            name: list_adapter_shapes(name, self.served[name], config)
            for name in self._targeted(config)
        }
        every = {key: shape for shapes in expected.values() for key, shape in shapes.items()}
        tensors, found = read(every), {}
        for name, shapes in expected.items():
            A, B = (tensors[key] for key in shapes)
            found[name] = Factors(A, B, config.scaling_of(name))
        return found

    def _copies(
        self, directory: str | os.PathLike[str], expected: Mapping[str, files.Shape]
    ) -> frozenset[str]:
        """Names of the base's own weights in the file; ValueError where they are others."""
        if files.read_shapes(directory).keys() <= expected.keys():
            return frozenset()
        path = Path(directory, files.WEIGHTS_NAME)
        status = path.stat()
        stamp = status.st_ino, status.st_size, status.st_mtime_ns
        known = self._compared.get(path)
        # An adapter that has had to make room is read often.
        if known is None or known[0] != stamp:
            copies = base_copies.read(directory, self.model, self.served, expected, fixed=_FIXED)
            known = self._compared[path] = stamp, copies.names
        return known[1]

    def _held_copies(
        self, tensors: Mapping[str, Tensor], expected: Mapping[str, files.Shape]
    ) -> frozenset[str]:
        """``_copies`` of tensors in memory."""
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
                own = base_copies.describe_own_rows(base_copies.strip_peft_wrappers(name), rows)
                raise ValueError(f"tensors: {own}, {_FIXED}")
        return frozenset(copies)

    def _targeted(self, config: LoRAConfig) -> list[str]:
        """The served layers that an adapter is for, checked against its config."""
        config.check_plain("of adapters served beside each other none")
        named = {name for name in self.linears if config.names(name)}
        if config.all_linear:
            named &= self.served.keys()
        if not named or not named <= self.served.keys():
            found = list_some(named - self.served.keys()) or "no layer at all"
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


@dataclass(frozen=True)
class AdapterTensors:
    """An adapter that came as tensors, which nobody else holds: kept, since nothing has them."""

    factors: dict[str, Factors]

    def __call__(self) -> dict[str, Factors]:
        return self.factors
