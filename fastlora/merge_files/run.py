"""Merging of files, one after another and a tensor at a time, so that it can stop anywhere."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastlora.backends.dtypes import CODES
from fastlora.config.listing import list_some
from fastlora.functional import fidelity
from fastlora.functional.fidelity import Fidelity, FidelityWarning
from fastlora.merge_files import durable, input_checks, journal, metadata, other_files, plan, shards
from fastlora.merge_files.adapters import AdapterFolder, read_adapter
from fastlora.merge_files.input_checks import Folder
from fastlora.merge_files.other_files import Others
from fastlora.merge_files.plan import Plan, WeightChange
from fastlora.merge_files.shards import CONFIG_NAME, INDEX_NAME, Entry, Shard
from fastlora.ops import dispatch

# Told the file being written, the number of files, and the share of it that is written.
Watch = Callable[[str, int, float], None]


@dataclass(frozen=True)
class Merged:
    """Result of a merge. fidelity: by the base's layer. skipped: layers left out, and why.

    nbytes: of all weights. kept: files that an earlier, interrupted run had finished. vocabulary:
    the base's tensors that adapters' rows have replaced; exchanged: those with more than added
    rows. others: files beside the weights, copied or not.
    """

    fidelity: dict[str, Fidelity]
    skipped: list[str]
    nbytes: int
    kept: list[str]
    vocabulary: list[str] = field(default_factory=list)
    exchanged: list[str] = field(default_factory=list)
    others: Others = field(default_factory=Others)

    @property
    def low(self) -> list[str]:
        """Layers that lost a good part of the adapters to rounding, the worst first."""
        # Not `<`: a gain may be NaN.
        low = [
            name
            for name, layer_fidelity in self.fidelity.items()
            if not layer_fidelity.gain >= fidelity.LOW_GAIN
        ]
        return sorted(low, key=lambda name: self.fidelity[name].gain)

    def warning(self) -> str | None:
        """Returns a text on ``low``, if there is any."""
        if not self.low:
            return None
        worst = self.low[0]
        return (
            f"{len(self.low)} of {len(self.fidelity)} layers kept less than "
            f"{fidelity.LOW_GAIN:.0%} of their adapters, the least {worst} "
            f"({self.fidelity[worst]}): the dtype rounds so small a change away; float32 keeps it"
        )


def merge_checkpoint(
    base: Folder,
    adapters: Folder | Sequence[Folder | tuple[Folder, float]],
    out: Folder,
    *,
    dtype: torch.dtype | None = None,
    allow_partial: bool = False,
) -> dict[str, Fidelity]:
    """Merges PEFT adapters into the safetensors of a model's folder, written to a new folder.

    ``W + sum of weight * scaling * lora_B @ lora_A``, summed in float32 (float64 for a float64
    base) and rounded once, into ``dtype`` or the base's own.

    - base: a local folder as transformers saves it, with transformers' names or those that it
      renames while loading (then it must be installed)
    - adapters: a folder, or several, or pairs (folder, weight)
    - out: gets the same files and tensors, and whatever else is in the base's folder, other models
      in sub-folders too, but for more weights of this one beside it

    ``out`` can be loaded once all is written, not before. Calling again with the same arguments
    resumes where a killed run stopped, to the same bytes. About two of the base's largest tensors
    are held at a time, and the adapters.

    Rows of the embeddings that an adapter has (of a resized vocabulary, say) take the base's place,
    and the config says how many. Returns the fidelity of each merged layer; a FidelityWarning tells
    of low ones, a UserWarning of what allow_partial left out, of rows that the base had otherwise,
    of files that were not copied, and of copies that are likely the unmerged model. Raises
    ValueError, TypeError, FileNotFoundError, FileExistsError or BlockingIOError naming what cannot
    be merged and why, OSError when the disk fails or is full.
    """
    merged = merge_folder(base, adapters, out, dtype=dtype, allow_partial=allow_partial)
    if merged.skipped:
        left_out = list_some(merged.skipped, 8, "; ")
        warnings.warn(f"{len(merged.skipped)} layers were left out: {left_out}", stacklevel=2)
    if merged.exchanged:
        warnings.warn("; ".join(merged.exchanged), stacklevel=2)
    for note in merged.others.notes():
        warnings.warn(note, stacklevel=2)
    warning = merged.warning()
    if warning is not None:
        warnings.warn(warning, FidelityWarning, stacklevel=2)
    return merged.fidelity


def merge_folder(
    base: Folder,
    adapters: Folder | Sequence[Folder | tuple[Folder, float]],
    out: Folder,
    *,
    dtype: torch.dtype | None = None,
    allow_partial: bool = False,
    watch: Watch | None = None,
) -> Merged:
    """Merges as ``merge_checkpoint`` without its warnings; ``watch`` is told the progress."""
    if dtype is not None and dtype not in shards.CODE_OF:
        names = ", ".join(map(str, shards.CODE_OF))
        raise ValueError(f"dtype: expected one of {names}, got {dtype!r}")
    checkpoint, folder = shards.open_checkpoint(base), Path(out)
    if folder.resolve().is_relative_to(checkpoint.folder.resolve()):
        raise ValueError(f"out: expected a folder outside of base, got {folder}")
    read = [read_adapter(*pair) for pair in input_checks.read_pairs(adapters)]
    steps = plan.make(checkpoint, read, dtype, allow_partial)
    rewritten = steps.weights.keys() | steps.vocabulary.tensors.keys()
    beside = other_files.find(checkpoint, rewritten, folder)
    return _run(steps, beside, _identify(steps, beside, read), folder, watch or (lambda *_: None))


def _identify(steps: Plan, beside: Others, adapters: Sequence[AdapterFolder]) -> dict[str, Any]:
    """Collects all that decides the output's bytes, by which a run knows its unfinished work."""
    base = steps.base
    files = [shard.path for shard in base.shards] + [base.folder / name for name in beside.copied]
    files += [base.folder / CONFIG_NAME, *([base.index] if base.index else [])]
    device = torch.device("cpu")
    backend = dispatch.choose("merge_", device, steps.dtype)
    return {
        "base": {str(path.relative_to(base.folder)): _stamp(path) for path in files},
        "adapters": [(adapter.digest, adapter.weight) for adapter in adapters],
        "dtype": str(steps.dtype),
        "layers": sorted(steps.weights),
        "arithmetic": dispatch.merge_kernel(backend, device),
    }


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _run(
    steps: Plan, beside: Others, identity: Mapping[str, Any], out: Path, watch: Watch
) -> Merged:
    base, all_fidelities, reused = steps.base, {}, []
    layouts = [_lay_out(shard, steps) for shard in base.shards]
    files = len(layouts) + sum(other_files.is_large(base.folder / name) for name in beside.copied)
    sizes = {out / name: (base.folder / name).stat().st_size for name in beside.copied}
    sizes |= {out / layout.path.name: len(layout.start) + layout.nbytes for layout in layouts}
    input_checks.check_room(out, sizes)

    def check(path: Path) -> None:
        if _stamp(path) != identity["base"][str(path.relative_to(base.folder))]:
            raise RuntimeError(f"base: {path} was changed meanwhile: start anew")

    with journal.open_journal(out, identity) as notes:
        for layout in layouts:
            name = layout.path.name
            watch(name, files, 0.0)
            fidelities = notes.find_finished(name)
            if fidelities is not None:
                reused.append(name)
            else:
                fidelities = {}
                show = functools.partial(watch, name, files)
                chunks = _iterate_chunks(steps, layout, check, fidelities, show)
                notes.finish(name, durable.write(out / name, chunks), fidelities)
            all_fidelities |= fidelities
        reused += other_files.copy(
            base, beside, out, notes, check, lambda name: watch(name, files, 0.0)
        )
        entries = [entry for layout in layouts for entry in layout.entries]
        nbytes = sum(entry.nbytes for entry in entries)
        if base.index is not None:
            durable.write(out / INDEX_NAME, metadata.make_index(base.index, entries, steps))
        # Last, since nothing loads a folder without a config.
        durable.write(out / CONFIG_NAME, metadata.make_config(base.folder / CONFIG_NAME, steps))
        notes.close()
    vocabulary = steps.vocabulary
    return Merged(
        dict(sorted(all_fidelities.items())),
        steps.skipped,
        nbytes,
        reused,
        vocabulary.notes,
        vocabulary.exchanged,
        beside,
    )


@dataclass(frozen=True)
class _Layout:
    """Layout of an output file. start: its bytes up to the tensors, which follow in this order."""

    path: Path
    source: Shard
    start: bytes
    entries: list[Entry]

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries)


def _lay_out(shard: Shard, steps: Plan) -> _Layout:
    before = list(shard.tensors.values())
    after = [steps.entry(entry.name).as_dtype(steps.dtype) for entry in before]
    if after == before:
        return _Layout(shard.path, shard, shard.start, before)
    # The widest first, as safetensors has it, so that every tensor is aligned.
    after.sort(key=lambda entry: -entry.itemsize)
    return _Layout(shard.path, shard, shards.make_start(after, shard.metadata), after)


def _iterate_chunks(
    steps: Plan,
    layout: _Layout,
    check: Callable[[Path], None],
    fidelities: dict[str, Fidelity],
    show: Callable[[float], None],
) -> Iterator[Any]:
    """Yields a file's bytes in pieces; puts the fidelity of its layers into ``fidelities``."""
    source, written, total = layout.source, 0, max(1, layout.nbytes)
    yield layout.start
    for entry in layout.entries:
        if steps.is_unchanged(entry) and entry.dtype == source.tensors[entry.name].dtype:
            yield from source.read_bytes(entry.name)
        else:
            yield shards.view_bytes(_merge_tensor(steps, source, entry, fidelities))
        written += entry.nbytes
        show(written / total)
    check(source.path)


def _merge_tensor(
    steps: Plan, source: Shard, entry: Entry, fidelities: dict[str, Fidelity]
) -> Tensor:
    """Returns a tensor as it is to be written, and notes its layer's fidelity."""
    name, dtype, change = entry.name, CODES[entry.dtype], steps.change(entry.name)
    stored = steps.read(source, name)
    try:
        merged = stored.to(dtype) if change is None else change.apply(stored, dtype)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    if not _stays_finite(stored, merged):
        raise ValueError(f"{name}: it has numbers that are not finite as {dtype}")
    if isinstance(change, WeightChange):
        # Beside the base in the same dtype: what else conversion costs is not the adapters' loss.
        before = change.orient(stored.to(dtype))
        layer = name.removesuffix(".weight")
        fidelities[layer] = fidelity.measure(before, change.orient(merged), change.adapters)
    return merged


def _stays_finite(before: Tensor, after: Tensor) -> bool:
    """Whether after is finite wherever before was."""
    # As a rule it is everywhere, which the extremes tell without a tensor of the weight's size.
    if not after.numel() or all(bound.isfinite() for bound in after.aminmax()):
        return True
    return bool((after.isfinite() | ~before.isfinite()).all())
