"""The merge itself: file after file, a tensor at a time, so that it may be stopped anywhere."""

from __future__ import annotations

import functools
import json
import math
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
from fastlora.merge_files import arguments, durable, journal, others, plan, shards
from fastlora.merge_files.adapters import AdapterFolder, read_adapter
from fastlora.merge_files.arguments import Folder
from fastlora.merge_files.others import Others
from fastlora.merge_files.plan import Plan, WeightChange
from fastlora.merge_files.shards import CONFIG_NAME, INDEX_NAME, Entry, Shard
from fastlora.ops import dispatch

# The file that is being written, of how many, and how much of it is: 0 to 1.
Watch = Callable[[str, int, float], None]


@dataclass(frozen=True)
class Merged:
    """fidelity: of each layer, by the base's name. skipped: layers that were left out, and why.

    nbytes: of all weights. kept: the files that an earlier, interrupted run had finished.
    vocabulary: what of the base the adapters' own rows have taken the place of; exchanged: where
    that is more than rows that were added. others: what lay beside the weights, copied or not.
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
        """The layers that lost a good part of the adapters to rounding, the worst first."""
        # Not `<`: a gain may be NaN.
        low = [name for name, found in self.fidelity.items() if not found.gain >= fidelity.LOW_GAIN]
        return sorted(low, key=lambda name: self.fidelity[name].gain)

    def warning(self) -> str | None:
        """What to say about ``low``."""
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
    base) and rounded once, into ``dtype`` or the base's own. base: a local folder as transformers
    saves it, with transformers' names or those that it renames while loading (then it must be
    installed); adapters: a folder, or several, or pairs (folder, weight). out: same files, same
    tensors, and whatever else is in the base's folder, other models in sub-folders too, but for
    more weights of this one beside it; loadable once all is written and not before; calling again
    with the same arguments resumes where a killed run stopped, to the same bytes. About two of the
    base's largest tensors are held at a time, and the adapters.

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
    """``merge_checkpoint`` without its warnings; ``watch`` is told how far it is."""
    if dtype is not None and dtype not in shards.CODE_OF:
        names = ", ".join(map(str, shards.CODE_OF))
        raise ValueError(f"dtype: expected one of {names}, got {dtype!r}")
    checkpoint, folder = shards.open_checkpoint(base), Path(out)
    if folder.resolve().is_relative_to(checkpoint.folder.resolve()):
        raise ValueError(f"out: expected a folder outside of base, got {folder}")
    read = [read_adapter(*pair) for pair in arguments.pairs(adapters)]
    steps = plan.make(checkpoint, read, dtype, allow_partial)
    rewritten = steps.weights.keys() | steps.vocabulary.tensors.keys()
    beside = others.find(checkpoint, rewritten, folder)
    return _run(steps, beside, _identity(steps, beside, read), folder, watch or (lambda *_: None))


def _identity(steps: Plan, beside: Others, adapters: Sequence[AdapterFolder]) -> dict[str, Any]:
    """All that decides the output's bytes: by it a run knows its own unfinished work."""
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
    base, found, kept = steps.base, {}, []
    layouts = [_layout(shard, steps) for shard in base.shards]
    files = len(layouts) + sum(others.is_large(base.folder / name) for name in beside.copied)
    sizes = {out / name: (base.folder / name).stat().st_size for name in beside.copied}
    sizes |= {out / layout.path.name: len(layout.start) + layout.nbytes for layout in layouts}
    arguments.check_room(out, sizes)

    def check(path: Path) -> None:
        if _stamp(path) != identity["base"][str(path.relative_to(base.folder))]:
            raise RuntimeError(f"base: {path} was changed meanwhile: start anew")

    with journal.opened(out, identity) as notes:
        for layout in layouts:
            name = layout.path.name
            watch(name, files, 0.0)
            fidelities = notes.finished(name)
            if fidelities is not None:
                kept.append(name)
            else:
                fidelities = {}
                show = functools.partial(watch, name, files)
                chunks = _chunks(steps, layout, check, fidelities, show)
                notes.finish(name, durable.write(out / name, chunks), fidelities)
            found |= fidelities
        kept += others.copy(base, beside, out, notes, check, lambda name: watch(name, files, 0.0))
        nbytes = sum(layout.nbytes for layout in layouts)
        if base.index is not None:
            durable.write(out / INDEX_NAME, _index(base.index, layouts, steps))
        # The last: nothing loads a folder without it.
        durable.write(out / CONFIG_NAME, _config(base.folder / CONFIG_NAME, steps))
        notes.close()
    given = steps.vocabulary
    return Merged(
        dict(sorted(found.items())),
        steps.skipped,
        nbytes,
        kept,
        given.said,
        given.exchanged,
        beside,
    )


@dataclass(frozen=True)
class _Layout:
    """A file to be written. start: its bytes up to the tensors, which follow in this order."""

    path: Path
    source: Shard
    start: bytes
    entries: list[Entry]

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries)


def _layout(shard: Shard, steps: Plan) -> _Layout:
    before = list(shard.tensors.values())
    after = [steps.entry(entry.name).as_dtype(steps.dtype) for entry in before]
    if after == before:
        return _Layout(shard.path, shard, shard.start, before)
    # The widest first, as safetensors has it, so that every tensor is aligned.
    after.sort(key=lambda entry: -entry.itemsize)
    return _Layout(shard.path, shard, shards.start_of(after, shard.metadata), after)


def _chunks(
    steps: Plan,
    layout: _Layout,
    check: Callable[[Path], None],
    fidelities: dict[str, Fidelity],
    show: Callable[[float], None],
) -> Iterator[Any]:
    """A file's bytes, in pieces; puts the fidelity of its layers where it is asked to."""
    source, written, total = layout.source, 0, max(1, layout.nbytes)
    yield layout.start
    for entry in layout.entries:
        if steps.kept(entry) and entry.dtype == source.tensors[entry.name].dtype:
            yield from source.bytes_of(entry.name)
        else:
            yield shards.raw(_merged(steps, source, entry, fidelities))
        written += entry.nbytes
        show(written / total)
    check(source.path)


def _merged(steps: Plan, source: Shard, entry: Entry, fidelities: dict[str, Fidelity]) -> Tensor:
    """A tensor as it is to be written."""
    name, dtype, change = entry.name, CODES[entry.dtype], steps.change(entry.name)
    stored = steps.read(source, name)
    try:
        merged = stored.to(dtype) if change is None else change.apply(stored, dtype)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    if not _finite_where(stored, merged):
        raise ValueError(f"{name}: it has numbers that are not finite as {dtype}")
    if isinstance(change, WeightChange):
        # Beside the base in the same dtype: what else conversion costs is not the adapters' loss.
        before = change.seen(stored.to(dtype))
        layer = name.removesuffix(".weight")
        fidelities[layer] = fidelity.measure(before, change.seen(merged), change.adapters)
    return merged


def _finite_where(before: Tensor, after: Tensor) -> bool:
    """Whether after is finite wherever before was."""
    # As a rule it is everywhere, which the extremes tell without a tensor of the weight's size.
    if not after.numel() or all(bound.isfinite() for bound in after.aminmax()):
        return True
    return bool((after.isfinite() | ~before.isfinite()).all())


def _index(path: Path, layouts: Sequence[_Layout], steps: Plan) -> list[bytes]:
    text = path.read_bytes()
    if steps.dtype is None and steps.vocabulary.size is None:
        return [text]
    index, entries = json.loads(text), [e for layout in layouts for e in layout.entries]
    sizes = {"total_size": sum(entry.nbytes for entry in entries)}
    if "total_parameters" in (index.get("metadata") or {}):
        sizes["total_parameters"] = sum(math.prod(entry.shape) for entry in entries)
    index["metadata"] = (index.get("metadata") or {}) | sizes
    return [json.dumps(index, indent=2, sort_keys=True).encode() + b"\n"]


def _config(path: Path, steps: Plan) -> list[bytes]:
    text = path.read_bytes()
    config = json.loads(text)
    before = json.dumps(config)
    if steps.dtype is not None:
        name = str(steps.dtype).removeprefix("torch.")
        if not _set_dtype(config, name):
            config["torch_dtype"] = name  # which newer and older transformers read
    steps.vocabulary.write(config)
    if json.dumps(config) == before:
        return [text]
    return [json.dumps(config, indent=2).encode() + b"\n"]


def _set_dtype(config: dict[str, Any], name: str) -> bool:
    """Exchanges the dtype, also that of inner models; whether the outer one had any."""
    known = [key for key in ("dtype", "torch_dtype") if isinstance(config.get(key), str)]
    config.update(dict.fromkeys(known, name))
    for inner in config.values():
        if isinstance(inner, dict):
            _set_dtype(inner, name)
    return bool(known)
