"""Weights of the base in adapter files.

PEFT saves the input and the output embedding along where one of them is a target, and where the
vocabulary has another size than the base's. Copies of what the base has are of no use; rows that
were added or trained belong to the adapter, and PEFT's loading puts them into the base.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastlora.adapters import files
from fastlora.adapters.stored import OwnRows, Stored, find_differing_rows, has_same_bits
from fastlora.inspection.wrappers import strip_wrappers
from fastlora.modules import dtensors
from fastlora.modules.saved_modules import SavedModule

_TRAINED = ".modules_to_save."
# Where PEFT's wrappers keep the base's module.
_WRAPPED = (".base_layer.", ".original_module.")


class Change(NamedTuple):
    """Rows for a tensor of the base, or, where it cannot be compared, all of it."""

    tensor: Tensor
    rows: OwnRows | Tensor


@dataclass(frozen=True)
class Copies:
    """Changes to the base that a file holds. names: tensors of the file that are copies."""

    names: frozenset[str]
    changes: Mapping[str, Change]
    warning: str | None

    def fill(self) -> None:
        """Puts it into the base, as PEFT does."""
        with torch.no_grad():
            for tensor, rows in self.changes.values():
                if isinstance(rows, Tensor):
                    dtensors.copy_whole(tensor, rows)
                else:
                    tensor[rows.indices.to(tensor.device)] = rows.values.to(tensor)

    def warn(self, stacklevel: int) -> None:
        """Says what of the base ``fill`` exchanges, beside rows that were added."""
        if self.warning is not None:
            warnings.warn(self.warning, stacklevel=stacklevel + 1)


def describe_own_rows(name: str, rows: OwnRows | None) -> str:
    """Says what an adapter's file holds of a base's tensor, for errors and warnings."""
    if rows is None:
        return f"it has a {name} of its own"
    kind = "the last " if rows.added else ""
    return f"it has {kind}{len(rows.indices)} of {rows.of} rows of {name} of its own"


def strip_peft_wrappers(name: str) -> str:
    """Returns the base's name of a tensor that PEFT's wrappers give another."""
    for wrapper in _WRAPPED:
        name = name.replace(wrapper, ".")
    return name


def find_embedding_tensors(
    shapes: Mapping[str, files.Shape], expected: Iterable[str]
) -> frozenset[str]:
    """Finds the embeddings' names beside ``expected`` in a file whose model is not known.

    None where they cannot be that: of more than two modules, or of two shapes.
    """
    names = {n for n in shapes.keys() - set(expected) if n.endswith((".weight", ".bias"))}
    owners = {name.rpartition(".")[0] for name in names}
    weights = {shapes.get(f"{owner}.weight", ()) for owner in owners}
    are_embeddings = (
        len(owners) <= 2 and len(weights) == 1 and all(len(shape) == 2 for shape in weights)
    )
    lora = any(".lora_" in name for name in names)
    return frozenset(names if are_embeddings and not lora else ())


def is_frozen_weight(name: str) -> bool:
    """Whether a tensor of an adapter's file is the weight of a layer that has LoRA there."""
    return ".base_layer." in name


def find_embeddings(model: nn.Module) -> dict[str, nn.Module]:
    """Finds the input and the output embedding by every name that the model has for them."""
    getters = (getattr(model, f"get_{end}_embeddings", None) for end in ("input", "output"))
    modules = [
        module for getter in getters if callable(getter) for module in (_call_getter(getter),)
    ]
    ids = {id(module) for module in modules if module is not None}
    named = model.named_modules(remove_duplicate=False) if ids else ()
    return {strip_wrappers(name): module for name, module in named if name and id(module) in ids}


def find_base_tensors(
    model: nn.Module, adapted: Collection[str], saved: Mapping[str, SavedModule]
) -> dict[str, Tensor]:
    """Finds {name that PEFT's files have for it: tensor} of all of the base that may be in one.

    adapted: layers that get LoRA. saved: modules that are trained whole.
    """
    tensors = {}
    for name, module in find_embeddings(model).items():
        wrapper = ".base_layer" if name in adapted else ""
        if name in saved:
            wrapper, module = ".original_module", saved[name].original
        for kind in ("weight", "bias"):
            tensor = module._parameters.get(kind)
            if tensor is not None:
                tensors[f"{name}{wrapper}.{kind}"] = tensor
    return tensors


def read(
    directory: str | os.PathLike[str],
    model: nn.Module,
    adapted: Collection[str],
    expected: Iterable[str],
    saved: Mapping[str, SavedModule] | None = None,
    moved: bool = False,
    merged: bool = False,
    fixed: str | None = None,
) -> Copies:
    """Reads the base's weights in the adapter in ``directory``, compared with ``model``'s.

    Streamed: no more of the file is held than a few rows, and those that differ. expected: names of
    the adapter's own tensors. moved: the layers' weights will be others (init_lora_weights).
    merged: the layers' weights are not the base's. fixed: where the base may not change, what to do
    instead.

    Raises ValueError, naming the call that resizes, where the model's vocabulary has another size,
    where copies of one tied weight differ, where the frozen weight of a layer with LoRA is another,
    or cannot be known, and where anything differs of a base that may not change.
    """
    shapes = files.read_shapes(directory)
    path, expected = Path(directory) / files.WEIGHTS_NAME, frozenset(expected)
    bases = find_base_tensors(model, adapted, saved or {})
    # Beside a trained module PEFT saves it once more, by what holds it there.
    saved_twice = {name: name.replace(_TRAINED, ".") for name in shapes if _TRAINED in name}
    saved_twice = {
        name: trained_name
        for name, trained_name in saved_twice.items()
        if trained_name in expected and name not in expected
    }
    compared = {name: base for name, base in bases.items() if name in shapes.keys() - expected}
    _check_vocabulary(path, shapes, bases, fixed)
    changes, exchanged = {}, []
    for name, base in compared.items():
        if shapes[name] != tuple(base.shape):
            continue  # told by name and shape, with all else that does not fit
        stored = Stored(path, files.PREFIX + name)
        if stored.dtype is None or not base.is_floating_point():
            raise ValueError(
                f"{path}: {name}: expected floats beside floats, got {stored.dtype} for a base of "
                f"{base.dtype}"
            )
        if is_frozen_weight(name) and merged:
            raise ValueError(
                f"{path}: it has {strip_peft_wrappers(name)} along, which is merged here and "
                "cannot be compared: unmerge_adapter, load_adapter and merge_adapter"
            )
        if dtensors.is_dtensor(base) or base.is_meta or (is_frozen_weight(name) and moved):
            changes[name] = Change(base, stored.read())
            continue
        rows = find_differing_rows(stored, lambda start, stop, base=base: base[start:stop])
        if rows is None:
            continue
        changes[name] = Change(base, rows)
        if not rows.added and not is_frozen_weight(name):
            exchanged.append(describe_own_rows(strip_peft_wrappers(name), rows))
        elif not rows.added:
            raise ValueError(
                f"{path}: {describe_own_rows(strip_peft_wrappers(name), rows)}, though PEFT "
                "freezes the weight of a layer with LoRA: it was trained on another base, load it "
                "into that"
            )
    if fixed is not None:
        for name, (_, rows) in changes.items():
            description = describe_own_rows(
                strip_peft_wrappers(name), None if isinstance(rows, Tensor) else rows
            )
            raise ValueError(f"{path}: {description}, {fixed}")
    for name, trained_name in saved_twice.items():
        _check_twice(path, name, trained_name)
    _check_tied(path, compared, changes)
    lost = _explain_missing_rows(bases, shapes, changes)
    warning = "; ".join(exchanged)
    if warning:
        warning += ": the base's are exchanged for them, and disable_adapter does not undo it"
    warning = "; ".join(filter(None, (warning, lost)))
    copied_names = {name for name in compared if shapes[name] == tuple(compared[name].shape)}
    warning = f"{path}: {warning}" if warning else None
    return Copies(frozenset(copied_names | saved_twice.keys()), changes, warning)


def _call_getter(getter: object) -> nn.Module | None:
    try:
        module = getter()  # pyright: ignore[reportCallIssue]
    except (NotImplementedError, AttributeError, TypeError):  # of models without one
        return None
    return module if isinstance(module, nn.Module) else None


def _check_vocabulary(
    path: Path,
    shapes: Mapping[str, files.Shape],
    bases: Mapping[str, Tensor],
    fixed: str | None,
) -> None:
    """Raises ValueError where the file and the model count different rows."""
    for name, base in bases.items():
        shape = shapes.get(name) or shapes.get(strip_peft_wrappers(name))
        if shape is None or len(shape) != base.dim() or shape[1:] != tuple(base.shape)[1:]:
            continue
        if shape[0] != base.shape[0]:
            resize = f"call model.resize_token_embeddings({shape[0]}) before load_adapter"
            raise ValueError(
                f"{path}: {strip_peft_wrappers(name)} has {shape[0]} rows, {base.shape[0]} in this "
                f"model: the adapter is for another vocabulary, {fixed or resize}"
            )


def _check_twice(path: Path, name: str, trained_name: str) -> None:
    parts = zip(
        *(Stored(path, files.PREFIX + each).chunks() for each in (name, trained_name)), strict=True
    )
    for (_, a), (_, b) in parts:
        if not has_same_bits(a, b):
            raise ValueError(f"{path}: {name} and {trained_name} differ: expected the same numbers")


def _check_tied(path: Path, compared: Mapping[str, Tensor], changes: Mapping[str, Change]) -> None:
    """Raises ValueError where names of one tensor of the model bring different numbers."""
    first: dict[int, str] = {}
    for name, base in compared.items():
        before = first.setdefault(id(base), name)
        if before != name and not _is_same_change(changes.get(before), changes.get(name)):
            raise ValueError(
                f"{path}: {strip_peft_wrappers(before)} and {strip_peft_wrappers(name)} differ, "
                "and in this model they are one tied weight: untie it first, with "
                "tie_word_embeddings=False"
            )


def _is_same_change(a: Change | None, b: Change | None) -> bool:
    if a is None or b is None:
        return a is b
    if isinstance(a.rows, OwnRows):
        return isinstance(b.rows, OwnRows) and a.rows.is_same(b.rows)
    return isinstance(b.rows, Tensor) and has_same_bits(a.rows, b.rows)


def _explain_missing_rows(
    bases: Mapping[str, Tensor], shapes: Mapping[str, files.Shape], changes: Mapping[str, Change]
) -> str | None:
    """Says what an adapter with rows of one embedding does not have of the other."""
    added = [c.tensor for c in changes.values() if isinstance(c.rows, OwnRows) and c.rows.added]
    for name, base in bases.items():
        plain = strip_peft_wrappers(name)
        is_known = any(base is c.tensor for c in changes.values()) or {name, plain} & shapes.keys()
        if added and not is_known and base.dim() > 1 and len(base) == len(added[0]):
            return (
                f"it has rows that were added to the vocabulary, but none for {plain}, which PEFT "
                "leaves out where only the other embedding is a target: this model's are taken"
            )
    return None
