"""Files beside the weights in a model's folder, and which of them are copied along."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

from fastlora.merge_files import durable
from fastlora.merge_files.journal import Journal
from fastlora.merge_files.shards import CONFIG_NAME, Checkpoint, open_shard

# Loaded by transformers, optimum, vLLM, llama.cpp, … instead of, or before, a folder's safetensors:
# from a merged model's folder they would load the base.
_SAME = (
    *("model.*safetensors", "model-*-of-*.safetensors", "model.safetensors.index*.json"),
    *("pytorch_model.*bin", "pytorch_model-*-of-*.bin", "pytorch_model.bin.index*.json"),
    *("tf_model*.h5", "tf_model*.index.json", "flax_model*.msgpack", "flax_model*.index.json"),
    *("model.ckpt*", "*.ot"),
)
# Exports of a whole model: in sub-folders too they are as a rule the base's.
_EXPORTS = (
    *("consolidated*", "*.gguf", "*.ggml", "ggml-model*", "*.onnx", "*.onnx_data", "*.onnx.data"),
    *("openvino_*.xml", "openvino_*.bin", "*.tflite", "*.mlmodel"),
)
_ADAPTERS = ("adapter_config.json", "adapter_model.*")
_TRAINING = ("optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt", "rng_state*.pth")
_WEIGHTS = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".npz", ".npy"),
    *(".pkl", ".pickle"),
)


@dataclass(frozen=True)
class Others:
    """Paths within the base. copied: all that is copied; the config is edited instead.

    weights: those of them with other models' weights. unmerged: those that are likely copies of the
    base. left: files that are not copied, with the reason.
    """

    copied: tuple[Path, ...] = ()
    weights: tuple[str, ...] = ()
    unmerged: tuple[str, ...] = ()
    left: Mapping[str, str] = field(default_factory=dict)

    def notes(self) -> list[str]:
        """Returns the texts that a user should read."""
        notes = []
        if self.left:
            reasons = "; ".join(f"{name}: {why}" for name, why in self.left.items())
            notes.append(f"{len(self.left)} files of the base were left out: {reasons}")
        if self.unmerged:
            notes.append(
                "copied as they are, and likely the base without the adapters: "
                + ", ".join(self.unmerged)
            )
        return notes


def find(base: Checkpoint, changed: Collection[str], out: Path) -> Others:
    """Sorts everything in the base's folder, sub-folders included, hidden files not.

    changed: the tensors that are merged. Links are followed; ValueError where one leads into a
    circle or to ``out``.
    """
    written = {shard.path for shard in base.shards} | {base.folder / CONFIG_NAME, base.index}
    copied, weights, unmerged, left_out = [], [], [], {}
    for path in _list_files(base.folder, out.resolve(), (base.folder.resolve(),)):
        if path in written:
            continue
        name = path.relative_to(base.folder)
        root, known = path.parent == base.folder, path.name.lower()
        reason = _explain_obstacle(path)
        same = not reason and (
            _matches_any(known, _EXPORTS) or _has_merged_tensor(path, base, changed)
        )
        if not reason and root:
            reason = _explain_obstacle_at_root(known, same)
        if reason:
            left_out[str(name)] = reason
            continue
        copied.append(name)
        if same:
            unmerged.append(str(name))
        elif known.endswith(_WEIGHTS):
            weights.append(str(name))
    return Others(tuple(copied), tuple(weights), tuple(unmerged), left_out)


def copy(
    base: Checkpoint,
    others: Others,
    out: Path,
    notes: Journal,
    check: Callable[[Path], None],
    watch: Callable[[str], None],
) -> list[str]:
    """Copies them into ``out``; returns the names of large ones that were whole already.

    check: raises if a file was changed while it was read; watch: told of large ones.
    """
    reused = []
    for other in others.copied:
        name, source = str(other), base.folder / other
        large = is_large(source)
        if large:
            watch(name)
            if notes.find_finished(name) is not None:
                reused.append(name)
                continue
        _make_folder(out, other.parent)
        written = durable.write(out / other, durable.read_chunks(source))
        check(source)
        if large:
            notes.finish(name, written, {})
    return reused


def is_large(path: Path) -> bool:
    """Whether a copy is worth a note, so that another run need not make it again."""
    return path.stat().st_size >= durable.CHUNK


def _list_files(folder: Path, out: Path, within: tuple[Path, ...]) -> Iterator[Path]:
    """Yields files of a folder and those below; within: real paths of it and its parents."""
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if not path.is_dir():
            yield path
            continue
        real = path.resolve()
        if any(parent.is_relative_to(real) for parent in within):
            raise ValueError(f"base: {path} leads in a circle, to {real}: expected no such link")
        if out.is_relative_to(real) or real.is_relative_to(out):
            raise ValueError(f"out: expected a folder outside of base, {path} leads to {out}")
        yield from _list_files(path, out, (*within, real))


def _explain_obstacle(path: Path) -> str | None:
    """Says why a file cannot or must not be copied; None where it can."""
    if path.name.endswith(durable.PARTIAL):
        return "begun and not finished"
    if path.is_file():
        return None
    return "a link to nothing" if path.is_symlink() else "no file"


def _explain_obstacle_at_root(name: str, same: bool) -> str | None:
    """Says why a file beside the merged weights would stand for another model; None if not."""
    if same or _matches_any(name, _SAME):
        return "the base without the adapters, which loaders may take for the model"
    if _matches_any(name, _ADAPTERS):
        return "an adapter, which transformers would put onto the merged model"
    if _matches_any(name, _TRAINING):
        return "a state of the base's training"
    return None


def _matches_any(name: str, patterns: Collection[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def _has_merged_tensor(path: Path, base: Checkpoint, changed: Collection[str]) -> bool:
    """Whether the file has a tensor that is merged, as it was."""
    if path.suffix != ".safetensors":
        return False
    try:
        tensors = open_shard(path).tensors
    except ValueError:  # whatever it is
        return False
    return any(
        name in changed and entry.shape == base.entry(name).shape for name, entry in tensors.items()
    )


def _make_folder(out: Path, folder: Path) -> None:
    """Makes a folder within ``out`` that lasts."""
    for part in (*reversed(folder.parents), folder):
        if not (out / part).is_dir():
            os.mkdir(out / part)
            durable.sync((out / part).parent)
