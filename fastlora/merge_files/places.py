"""Where an adapter's layers are in a checkpoint, whose names may have another prefix."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from fastlora.listing import some
from fastlora.merge_files.adapters import AdapterFolder
from fastlora.merge_files.shards import Checkpoint


@dataclass(frozen=True)
class Places:
    """The adapter's name of a layer with the prefix ``gone`` exchanged for ``before``.

    layers: those that the base has a weight for.
    """

    layers: frozenset[str]
    gone: str = ""
    before: str = ""

    def of(self, name: str) -> str:
        """The base's name of a layer, or of what it does not have."""
        moved = self.before + name.removeprefix(self.gone)
        return moved if moved in self.layers else name

    def back(self, layer: str) -> str:
        """The adapter's name of a layer of the base."""
        if not layer.startswith(self.before):
            return layer
        return self.gone + layer.removeprefix(self.before)


def find(base: Checkpoint, adapter: AdapterFolder) -> Places:
    """The one exchange of prefixes that finds most of the adapter's layers.

    transformers' checkpoints have or lack what the class in use puts before every name. One prefix
    for all: alone, the end of a name may well fit a layer of another tower. Raises ValueError when
    several fit as well.
    """
    layers = frozenset(
        name.removesuffix(".weight") for name in base.holder if name.endswith(".weight")
    )
    by_end: dict[str, list[str]] = {}
    for layer in layers:
        by_end.setdefault(layer.rpartition(".")[2], []).append(layer)
    found: Counter[tuple[str, str]] = Counter()
    for name in adapter.layers:
        for layer in by_end.get(name.rpartition(".")[2], ()):
            if layer == name:
                found["", ""] += 1
            elif layer.endswith("." + name):
                found["", layer.removesuffix(name)] += 1
            elif name.endswith("." + layer):
                found[name.removesuffix(layer), ""] += 1
    best = sorted(move for move, count in found.items() if count == max(found.values()))
    if len(best) > 1 and best[0] != ("", ""):
        prefixes = " and ".join(repr(before) if before else f"no {gone!r}" for gone, before in best)
        raise ValueError(
            f"{adapter.folder}: its layers ({some(adapter.layers)}) fit several parts of "
            f"{base.folder}, with {prefixes}: expected names that say which"
        )
    return Places(layers, *best[0]) if best else Places(layers)


def absent(adapter: AdapterFolder, places: Places) -> list[str]:
    """The adapter's layers that the base does not have."""
    return [name for name in adapter.layers if places.of(name) not in places.layers]


def unfilled(base: Checkpoint, adapter: AdapterFolder, places: Places) -> list[str]:
    """Layers of the base that the adapter's config names, though its file has nothing for them."""
    filled = {places.of(name) for name in adapter.layers}
    return [
        layer
        for layer in sorted(places.layers - filled)
        if len(base.entry(f"{layer}.weight").shape) == 2 and adapter.names(places.back(layer))
    ]
