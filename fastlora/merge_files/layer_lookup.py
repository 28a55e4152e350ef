"""Lookup of an adapter's layers in a checkpoint, whose names may differ from the model's."""

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
    """Places of an adapter's layers: its names with the prefix ``gone`` replaced by ``before``.

    files: the base's names by the replaced ones, which are the same or the model's; old: replaced
    names by the adapter's, where it has neither. unknown: why transformers could not be asked;
    uninstalled: whether that is because it is not installed and may know the names.
    """

    files: Mapping[str, str]
    gone: str = ""
    before: str = ""
    old: Mapping[str, str] = field(default_factory=dict)
    unknown: str = ""
    uninstalled: bool = False

    def moved(self, name: str) -> str:
        """Returns the name by which a layer of the adapter is looked up."""
        return self.before + self.old.get(name, name).removeprefix(self.gone)

    def of(self, name: str) -> str:
        """Returns the base's name of a layer, or the adapter's where the base lacks it."""
        return self.files.get(self.moved(name), name)

    def has(self, name: str) -> bool:
        """Whether the base has this layer of the adapter."""
        return self.moved(name) in self.files

    def back(self, known: str) -> str:
        """Returns the adapter's name of a layer by its name in ``files``."""
        if not known.startswith(self.before):
            return known
        return self.gone + known.removeprefix(self.before)


def find(base: Checkpoint, adapter: AdapterFolder) -> Places:
    """Finds the reading of the adapter's names that matches most of its layers.

    As they stand, as the model's names that transformers' table gives for the base's, or as older
    names: adapters keep those of the transformers that they were trained with. Raises
    ValueError where several ways fit and lead to different layers, where the base has two weights
    for one, and where one is not in the files as it is in the model.
    """
    layers = [name.removesuffix(".weight") for name in base.holder if name.endswith(".weight")]
    plain = _match_prefix(base, adapter, {layer: layer for layer in layers})
    # Names of a model without inner models usually match as they stand; transformers is not asked.
    if _finds_all(adapter, plain) and not renaming.is_composite(base):
        return _raise_if_error(adapter, plain)
    try:
        table = renaming.read(base)
    except LookupError as error:
        uninstalled = isinstance(error, renaming.NotInstalled) and renaming.is_composite(base)
        plain = _raise_if_error(adapter, plain)
        return replace(plain, unknown=str(error), uninstalled=uninstalled)
    ways = [
        plain,
        _match_prefix(base, adapter, table.files),
        _match_prefix(base, adapter, table.files, table.translate_old(_list_names(adapter))),
    ]
    whole = [way for way in ways if _finds_all(adapter, way)]
    for name in adapter.layers:
        leads_to = sorted({way.of(name) for way in whole if isinstance(way, Places)})
        if len(leads_to) > 1:
            raise ValueError(
                f"{adapter.folder}: {name} may be {' or '.join(leads_to)} of {base.folder}, which "
                "transformers renames while it loads them: expected a name that says which"
            )
    places = _raise_if_error(adapter, min(ways, key=lambda way: _count_lost(adapter, way)))
    _check_single(base, adapter, places, table)
    return places


def _match_prefix(
    base: Checkpoint,
    adapter: AdapterFolder,
    files: Mapping[str, str],
    old: Mapping[str, str] | None = None,
) -> Places | ValueError:
    """Returns the change of prefix that finds most of the layers, or the error that several do.

    transformers' checkpoints have or lack the prefix of the class in use. There is one prefix for
    all: the end of a single name may fit a layer of another tower.
    """
    old = old or {}
    by_end: dict[str, list[str]] = {}
    for layer in files:
        by_end.setdefault(layer.rpartition(".")[2], []).append(layer)
    moves: Counter[tuple[str, str]] = Counter()
    for name in (old.get(name, name) for name in adapter.layers):
        for layer in by_end.get(name.rpartition(".")[2], ()):
            if layer == name:
                moves["", ""] += 1
            elif layer.endswith("." + name):
                moves["", layer.removesuffix(name)] += 1
            elif name.endswith("." + layer):
                moves[name.removesuffix(layer), ""] += 1
    best = sorted(move for move, count in moves.items() if count == max(moves.values()))
    if len(best) > 1 and best[0] != ("", ""):
        prefixes = " and ".join(repr(before) if before else f"no {gone!r}" for gone, before in best)
        return ValueError(
            f"{adapter.folder}: its layers ({list_some(adapter.layers)}) fit several parts of "
            f"{base.folder}, with {prefixes}: expected names that say which"
        )
    return Places(files, *(best[0] if best else ("", "")), old=old)


def _list_names(adapter: AdapterFolder) -> set[str]:
    """Lists all names to look up: layers, also those with only a bias or a copy."""
    owners = {name.rpartition(".")[0] for name in adapter.copies}
    return {*adapter.layers, *adapter.biases, *adapter.copies, *owners}


def _count_lost(adapter: AdapterFolder, way: Places | ValueError) -> int:
    """Counts the adapter's layers that a reading does not find."""
    return len(list_absent(adapter, way)) if isinstance(way, Places) else len(adapter.layers)


def _finds_all(adapter: AdapterFolder, way: Places | ValueError) -> bool:
    return _count_lost(adapter, way) == 0


def _raise_if_error(adapter: AdapterFolder, way: Places | ValueError) -> Places:
    if isinstance(way, ValueError):
        raise way
    return way


def _check_single(
    base: Checkpoint, adapter: AdapterFolder, places: Places, table: Renaming
) -> None:
    """Raises ValueError unless every layer has one weight in the files, as the model has it."""
    weight_names = {places.of(name) + ".weight" for name in adapter.layers if places.has(name)}
    for layer, files in table.twice.items():
        if weight_names & set(files):
            raise ValueError(
                f"base: {base.folder} has {' and '.join(files)}, which transformers both loads as "
                f"{layer}.weight: expected one of them"
            )
    computed = {
        name: table.made[places.moved(name)]
        for name in list_absent(adapter, places)
        if places.moved(name) in table.made
    }
    if computed:
        names, sources = list_some(computed), list_some(computed[min(computed)])
        raise ValueError(
            f"{adapter.folder}: {len(computed)} of its layers have weights that transformers "
            f"computes while loading and that are not in {base.folder} as such ({names}; the first "
            f"of {sources}): load it into the model, merge_and_unload, and save that"
        )


def list_absent(adapter: AdapterFolder, places: Places) -> list[str]:
    """Lists the adapter's layers that the base does not have."""
    return [name for name in adapter.layers if not places.has(name)]


def list_unfilled(base: Checkpoint, adapter: AdapterFolder, places: Places) -> list[str]:
    """Lists layers of the base that the adapter's config names and its file lacks."""
    filled = {places.of(name) for name in adapter.layers}
    return sorted(
        layer
        for known, layer in places.files.items()
        if layer not in filled
        and len(base.entry(f"{layer}.weight").shape) == 2
        and adapter.names(places.back(known))
    )


def group_by_kind(names: Iterable[str]) -> list[str]:
    """Groups names that differ only in numbers, with a count where there are several."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(re.sub(r"(?<![^.])\d+(?![^.])", "*", name), []).append(name)
    return [f"{kind} ({len(of)})" if len(of) > 1 else of[0] for kind, of in kinds.items()]
