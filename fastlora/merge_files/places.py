"""Where an adapter's layers are in a checkpoint, whose names may be others than the model's."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from fastlora.config.listing import list_some
from fastlora.merge_files import renaming
from fastlora.merge_files.adapters import AdapterFolder
from fastlora.merge_files.renaming import Renaming
from fastlora.merge_files.shards import Checkpoint


@dataclass(frozen=True)
class Places:
    """The adapter's name of a layer with the prefix ``gone`` exchanged for ``before``.

    files: the base's names by those that the exchange leads to, which are the same or the model's;
    old: these by the adapter's, where it has neither. unknown: why transformers could not be asked,
    uninstalled: because it is not there and may well know.
    """

    files: Mapping[str, str]
    gone: str = ""
    before: str = ""
    old: Mapping[str, str] = field(default_factory=dict)
    unknown: str = ""
    uninstalled: bool = False

    def moved(self, name: str) -> str:
        """What a layer of the adapter is called where it is looked up."""
        return self.before + self.old.get(name, name).removeprefix(self.gone)

    def of(self, name: str) -> str:
        """The base's name of a layer, or of what it does not have."""
        return self.files.get(self.moved(name), name)

    def has(self, name: str) -> bool:
        """Whether the base has this layer of the adapter."""
        return self.moved(name) in self.files

    def back(self, known: str) -> str:
        """The adapter's name of a layer, of which that in ``files`` is given."""
        if not known.startswith(self.before):
            return known
        return self.gone + known.removeprefix(self.before)


def find(base: Checkpoint, adapter: AdapterFolder) -> Places:
    """The one way to read the adapter's names that finds most of its layers.

    As they stand, as the model's that transformers' table leads to from the base's, or as old
    names of it: adapters keep those of the transformers that they were trained with. Raises
    ValueError where several ways fit and lead to different layers, where the base has two weights
    for one, and where one is not in the files as it is in the model.
    """
    layers = [name.removesuffix(".weight") for name in base.holder if name.endswith(".weight")]
    plain = _read(base, adapter, {layer: layer for layer in layers})
    # Names of a model that has no others within are as they stand, as a rule: nothing is asked.
    if _whole(adapter, plain) and not renaming.composite(base):
        return _chosen(adapter, plain)
    try:
        table = renaming.read(base)
    except LookupError as error:
        uninstalled = isinstance(error, renaming.NotInstalled) and renaming.composite(base)
        plain = _chosen(adapter, plain)
        return replace(plain, unknown=str(error), uninstalled=uninstalled)
    ways = [
        plain,
        _read(base, adapter, table.files),
        _read(base, adapter, table.files, table.of_old(_names(adapter))),
    ]
    whole = [way for way in ways if _whole(adapter, way)]
    for name in adapter.layers:
        leads_to = sorted({way.of(name) for way in whole if isinstance(way, Places)})
        if len(leads_to) > 1:
            raise ValueError(
                f"{adapter.folder}: {name} may be {' or '.join(leads_to)} of {base.folder}, which "
                "transformers renames while it loads them: expected a name that says which"
            )
    found = _chosen(adapter, min(ways, key=lambda way: _lost(adapter, way)))
    _check_single(base, adapter, found, table)
    return found


def _read(
    base: Checkpoint,
    adapter: AdapterFolder,
    files: Mapping[str, str],
    old: Mapping[str, str] | None = None,
) -> Places | ValueError:
    """The one exchange of prefixes that finds most of the layers, or the error that several do.

    transformers' checkpoints have or lack what the class in use puts before every name. One prefix
    for all: alone, the end of a name may well fit a layer of another tower.
    """
    old = old or {}
    by_end: dict[str, list[str]] = {}
    for layer in files:
        by_end.setdefault(layer.rpartition(".")[2], []).append(layer)
    found: Counter[tuple[str, str]] = Counter()
    for name in (old.get(name, name) for name in adapter.layers):
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
        return ValueError(
            f"{adapter.folder}: its layers ({list_some(adapter.layers)}) fit several parts of "
            f"{base.folder}, with {prefixes}: expected names that say which"
        )
    return Places(files, *(best[0] if best else ("", "")), old=old)


def _names(adapter: AdapterFolder) -> set[str]:
    """All that is looked up: layers, also those that it has nothing but a bias or a copy of."""
    owners = {name.rpartition(".")[0] for name in adapter.copies}
    return {*adapter.layers, *adapter.biases, *adapter.copies, *owners}


def _lost(adapter: AdapterFolder, way: Places | ValueError) -> int:
    """How many of the adapter's layers a way to read them does not find."""
    return len(absent(adapter, way)) if isinstance(way, Places) else len(adapter.layers)


def _whole(adapter: AdapterFolder, way: Places | ValueError) -> bool:
    return _lost(adapter, way) == 0


def _chosen(adapter: AdapterFolder, way: Places | ValueError) -> Places:
    if isinstance(way, ValueError):
        raise way
    return way


def _check_single(base: Checkpoint, adapter: AdapterFolder, found: Places, table: Renaming) -> None:
    """That every layer has one weight in the files, which is what the model has."""
    places = {found.of(name) + ".weight" for name in adapter.layers if found.has(name)}
    for layer, files in table.twice.items():
        if places & set(files):
            raise ValueError(
                f"base: {base.folder} has {' and '.join(files)}, which transformers both loads as "
                f"{layer}.weight: expected one of them"
            )
    made = {
        name: table.made[found.moved(name)]
        for name in absent(adapter, found)
        if found.moved(name) in table.made
    }
    if made:
        sources = made[min(made)]
        raise ValueError(
            f"{adapter.folder}: {len(made)} of its layers have weights that transformers computes "
            f"while loading and that are not in {base.folder} as such ({list_some(made)}; the "
            f"first of {list_some(sources)}): load it into the model, merge_and_unload, and save "
            "that"
        )


def absent(adapter: AdapterFolder, places: Places) -> list[str]:
    """The adapter's layers that the base does not have."""
    return [name for name in adapter.layers if not places.has(name)]


def unfilled(base: Checkpoint, adapter: AdapterFolder, places: Places) -> list[str]:
    """Layers of the base that the adapter's config names, though its file has nothing for them."""
    filled = {places.of(name) for name in adapter.layers}
    return sorted(
        layer
        for known, layer in places.files.items()
        if layer not in filled
        and len(base.entry(f"{layer}.weight").shape) == 2
        and adapter.names(places.back(known))
    )


def kinds(names: Iterable[str]) -> list[str]:
    """Names that differ in numbers alone as one, with how many they are where there are many."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(re.sub(r"(?<![^.])\d+(?![^.])", "*", name), []).append(name)
    return [f"{kind} ({len(of)})" if len(of) > 1 else of[0] for kind, of in found.items()]
