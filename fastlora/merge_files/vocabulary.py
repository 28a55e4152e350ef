"""Weights of the base in adapters' files, and rows that a resized vocabulary has more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

from fastlora.adapters.base_copies import describe_own_rows, is_frozen_weight
from fastlora.adapters.stored import OwnRows, Stored, find_differing_rows, have_same_rows
from fastlora.merge_files.adapters import AdapterFolder
from fastlora.merge_files.layer_lookup import Places
from fastlora.merge_files.shards import Checkpoint, Entry, Shard

_ANOTHER = "it was trained on another base, merge it into that"


@dataclass
class Vocabulary:
    """Tensors that adapters bring whole, by the base's name, which take the base's place.

    size: how many rows the vocabulary has, None where as many as the base's. exchanged: rows that
    the base had otherwise, for people; notes: on all such rows; skipped: what is left out.
    untied: whether the output
    layer is changed and not the embedding, though the config says they are one.
    """

    tensors: dict[str, Stored] = field(default_factory=dict)
    size: int | None = None
    notes: list[str] = field(default_factory=list)
    exchanged: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    untied: bool = False

    def entry(self, entry: Entry) -> Entry:
        """Returns the entry of a base's tensor as it will be."""
        stored = self.tensors.get(entry.name)
        if stored is None or stored.shape == entry.shape:
            return entry
        nbytes = round(prod(stored.shape) * entry.itemsize)
        return replace(entry, shape=stored.shape, nbytes=nbytes)

    def write(self, config: dict[str, Any]) -> None:
        """Writes sizes and tying into a model's config, and its text model's."""
        # T5-like encoder-decoders scale outputs by this setting.
        untied = self.untied and not config.get("is_encoder_decoder")
        for each in (config, config.get("text_config")):
            if not isinstance(each, dict):
                continue
            if self.size is not None and "vocab_size" in each:
                each["vocab_size"] = self.size
            if untied and each.get("tie_word_embeddings"):
                each["tie_word_embeddings"] = False

    def check_whole(self, base: Checkpoint) -> None:
        """Raises ValueError where only one of the base's two embeddings would have the new size."""
        if self.size is None:
            return
        shapes = {base.entry(name).shape for name in self.tensors}
        rows = base.option("vocab_size")
        outputs = {f"{name.removesuffix('.weight')}.bias" for name in self.tensors}
        for name, shard in base.holder.items():
            shape = shard.tensors[name].shape
            if name not in self.tensors and (
                (len(shape) > 1 and shape in shapes) or (name in outputs and shape == (rows,))
            ):
                raise ValueError(
                    f"the adapters have {self.size} rows of {', '.join(self.tensors)}, and none of "
                    f"{name}, which has {rows} in {base.folder} (PEFT leaves out an embedding that "
                    "is no target where the other one is): merge into the resized model that it "
                    "was trained on"
                )


def find(
    base: Checkpoint, adapters: Sequence[tuple[AdapterFolder, Places]], allow_partial: bool
) -> Vocabulary:
    """Finds copies of the base's weights in adapters that differ from the base's.

    Raises ValueError, naming file and tensor, for what the base has no place for, what is no
    embedding, frozen weights of another base, and adapters that disagree.
    """
    vocabulary = Vocabulary()
    copies_of: dict[str, list[tuple[AdapterFolder, Stored]]] = {}
    for adapter, places in adapters:
        for name, stored in adapter.copies.items():
            owner, _, kind = name.rpartition(".")
            place = f"{places.of(owner)}.{kind}"
            if place in base.holder:
                copies_of.setdefault(place, []).append((adapter, stored))
            # Layers that the base lacks are reported elsewhere.
            elif owner not in adapter.layers and not _is_twin(base, adapter, places, name):
                _note_missing(base, adapter, place, allow_partial, vocabulary)
    for place, copies in copies_of.items():
        changed = [_find_change(base, place, adapter, stored) for adapter, stored in copies]
        if not any(changed):
            continue
        (first, stored), *others = copies
        for other, another in others:
            if not have_same_rows(stored, another):
                raise ValueError(
                    f"{first.folder} and {other.folder}: they have different rows of {place}: "
                    "merge one of them, and the other into what that gives"
                )
        vocabulary.tensors[place] = stored
        _note_change(base, place, first, stored, next(filter(None, changed)), vocabulary)
    sizes = {stored.shape[0] for stored in vocabulary.tensors.values()} - {
        base.option("vocab_size")
    }
    if len(sizes) > 1:
        raise ValueError(
            f"the adapters are for vocabularies of {' and '.join(map(str, sorted(sizes)))} rows"
        )
    vocabulary.size = next(iter(sizes), None)
    if vocabulary.size is not None:
        vocabulary.notes.append(
            f"vocab_size={vocabulary.size}; the tokenizer is the base's, without new tokens"
        )
    return vocabulary


@dataclass(frozen=True)
class _Change:
    rows: OwnRows | None  # None where there are only fewer


def _find_change(
    base: Checkpoint, place: str, adapter: AdapterFolder, stored: Stored
) -> _Change | None:
    """Returns what differs in a copy from the base; ValueError unless it is an embedding's rows."""
    entry = base.entry(place)
    if stored.dtype is None or not entry.floating or stored.shape[1:] != entry.shape[1:]:
        raise ValueError(
            f"{adapter.folder}: {place}: expected floats of shape {entry.shape} as in "
            f"{base.folder}, got {stored.shape}"
        )
    tensor = base.holder[place].read(place)
    rows = find_differing_rows(stored, lambda start, stop: tensor[start:stop])
    if rows is None and stored.shape == entry.shape:
        return None
    if entry.shape[0] != base.option("vocab_size"):
        description = describe_own_rows(place, rows)
        raise ValueError(f"{adapter.folder}: {description}, which is no embedding: {_ANOTHER}")
    if rows is not None and is_frozen_weight(stored.key) and _count_old(entry.shape[0], rows):
        raise ValueError(
            f"{adapter.folder}: {describe_own_rows(place, rows)}, though PEFT freezes the weight "
            f"of a layer with LoRA: {_ANOTHER}"
        )
    return _Change(rows)


def _count_old(before: int, rows: OwnRows) -> int:
    """Counts rows that are not new ones, added to the ``before`` rows of the base."""
    return 0 if rows.of == before and rows.added else int((rows.indices < before).sum())


def _note_change(
    base: Checkpoint,
    place: str,
    adapter: AdapterFolder,
    stored: Stored,
    changed: _Change,
    vocabulary: Vocabulary,
) -> None:
    before, rows = base.entry(place).shape[0], changed.rows
    text = f"{place} of {adapter.folder}: {stored.shape[0]} rows"
    if stored.shape[0] != before:
        text += f" instead of {before}"
    if rows is not None and (old := _count_old(before, rows)):
        text += f", {old} of them exchanged for what the base has"
        vocabulary.exchanged.append(text)
    vocabulary.notes.append(text)


def _is_twin(base: Checkpoint, adapter: AdapterFolder, places: Places, name: str) -> bool:
    """Whether a tensor that the base lacks is another's, with which it is tied there."""
    if base.option("tie_word_embeddings") is False:
        return False
    kind = name.rpartition(".")[2]
    for other, stored in adapter.copies.items():
        owner = other.rpartition(".")[0]
        if other.endswith(kind) and f"{places.of(owner)}.{kind}" in base.holder:
            if have_same_rows(adapter.copies[name], stored):
                return True
            raise ValueError(
                f"{adapter.folder}: {name} and {other} differ, and in {base.folder} they are one "
                "tied weight: untie and save the base first (config.tie_word_embeddings=False, and "
                "a clone as the output layer's weight)"
            )
    # Or a bias, which may be called otherwise too.
    shape = adapter.copies[name].shape
    return any(
        entry.shape == shape and entry.floating and _is_copy(shard, entry, adapter.copies[name])
        for shard in base.shards
        for entry in shard.tensors.values()
    )


def _is_copy(shard: Shard, entry: Entry, stored: Stored) -> bool:
    tensor = shard.read(entry.name)
    return find_differing_rows(stored, lambda start, stop: tensor[start:stop]) is None


def _note_missing(
    base: Checkpoint,
    adapter: AdapterFolder,
    place: str,
    allow_partial: bool,
    vocabulary: Vocabulary,
) -> None:
    if not allow_partial:
        raise ValueError(
            f"{adapter.folder}: it has {place} along, which is not in {base.folder}: merge it into "
            "the model that it was trained on, or leave it out with allow_partial=True "
            "(--allow-partial)"
        )
    vocabulary.skipped.append(f"{place} of {adapter.folder}: not in the base")
