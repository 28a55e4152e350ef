"""PEFT's adapter files on disk: ``adapter_config.json`` and ``adapter_model.safetensors``.

Files are not trusted: safetensors only, the header is read and capped first, and no tensor is read
before every name and shape in the header is the expected one.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Iterable, Mapping, Set
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastlora.adapters import hints
from fastlora.config import LoRAConfig, matching, refusals
from fastlora.config.listing import list_some

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PREFIX = "base_model.model."

# Generous: an adapter of a 1000-layer model has some 10**4 tensors and a header of about 1 MiB.
_MAX_CONFIG_BYTES = 1 << 20
_MAX_HEADER_BYTES = 1 << 25
_MAX_TENSORS = 100_000
_MAX_BYTES = 1 << 36
_DTYPES = ("F16", "BF16", "F32", "F64")
# Dtypes of buffers of modules that are saved whole.
_COUNTS = ("I64", "I32", "I16", "I8", "U8", "BOOL")
_A = ".lora_A.weight"
_NAME = re.compile(r"[A-Za-z0-9._-]{1,128}")

Shape = tuple[int, ...]


def check_name(adapter_name: object) -> str:
    """Returns the name, if it matches ``[A-Za-z0-9._-]{1,128}`` (and is no path such as ``..``)."""
    if (
        not isinstance(adapter_name, str)
        or not _NAME.fullmatch(adapter_name)
        or not adapter_name.strip(".")
    ):
        raise ValueError(
            f"adapter_name: expected to match [A-Za-z0-9._-]{{1,128}}, got {adapter_name!r}"
        )
    return adapter_name


def as_folder(directory: str | os.PathLike[str]) -> Path:
    """Returns a Path; TypeError for anything that is none."""
    if not isinstance(directory, (str, os.PathLike)):
        raise TypeError(f"directory: expected the path of a folder, got {directory!r}")
    return Path(directory)


def read_config(directory: str | os.PathLike[str], trainable: bool = False) -> LoRAConfig:
    """Reads the config of the adapter in ``directory``; ValueError or FileNotFoundError if bad.

    trainable: whether it is to be trained on. How it began (EVA and others that leave the base as
    it is) is not asked; one whose base was changed (CorDA, LoRA-GA, LoftQ) is refused.

    Where keys of rank_pattern overlap, the tensors say which of them counted. Where those of
    alpha_pattern do, in the order of the alphabet, so that the one they were given in is lost, the
    first counts, with a warning: PEFT takes it too.
    """
    path = _find_file(directory, CONFIG_NAME)
    if path.stat().st_size > _MAX_CONFIG_BYTES:
        raise ValueError(
            f"{path}: expected at most {_MAX_CONFIG_BYTES} bytes, got {path.stat().st_size}"
        )
    values = read_json(path)
    try:
        config = LoRAConfig.from_dict(refusals.drop_history(values, trainable))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None
    if len(config.rank_pattern) < 2 and len(config.alpha_pattern) < 2:
        return config
    return restore_order(str(path), config, read_shapes(directory))


def restore_order(where: str, config: LoRAConfig, shapes: Mapping[str, Shape]) -> LoRAConfig:
    """Restores the order of a file's patterns, as far as its tensors know it."""
    ranks = {name: shapes[name + _A][0] for name in _list_layers(shapes) if shapes[name + _A]}
    _warn_of_lost_order(where, config.alpha_pattern, ranks)
    return replace(
        config,
        rank_pattern=matching.resolve_overlaps(config.rank_pattern, ranks, ranks),
        alpha_pattern=matching.resolve_overlaps(config.alpha_pattern, ranks),
    )


def _list_layers(tensors: Mapping[str, object]) -> list[str]:
    return [name.removesuffix(_A) for name in tensors if name.endswith(_A)]


def _warn_of_lost_order(where: str, pattern: Mapping[str, float], names: Iterable[str]) -> None:
    overlaps = matching.find_overlaps(pattern, names)
    if not overlaps or list(pattern) != sorted(pattern):
        return
    names_by_keys: dict[str, list[str]] = {}
    for name, keys in overlaps.items():
        listed = " or ".join(f"{value:g} ({key!r})" for key, value in keys.items())
        names_by_keys.setdefault(listed, []).append(name)
    examples = "; ".join(
        f"{list_some(set(of))}: {listed}" for listed, of in list(names_by_keys.items())[:4]
    )
    warnings.warn(
        f"{where}: alpha_pattern: more than one key matches, and the first counts: {examples}. "
        "PEFT writes keys in the order of the alphabet, not in that in which they counted in "
        "training: taken as they stand, as PEFT does; full names as keys, which fastlora writes, "
        "would tell",
        stacklevel=4,
    )


def read_json(path: Path) -> dict[str, Any]:
    """Reads the JSON object in a file; ValueError where it holds anything else."""
    hints.check_content(path)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(values).__name__}")
    return values


def read_shapes(directory: str | os.PathLike[str]) -> dict[str, Shape]:
    """Reads {tensor name without PEFT's prefix: shape}, from the header alone."""
    path = _find_file(directory, WEIGHTS_NAME)
    hints.check_content(path)
    with path.open("rb") as file:
        return read_header(path, file, path.stat().st_size)


def read_header(path: Path | str, file: BinaryIO, size: int) -> dict[str, Shape]:
    """``read_shapes`` of an open file of ``size`` bytes; path: what errors call it."""
    header = _read_header(path, file, size)
    hints.check_names(path, header)
    shapes = {}
    for key, entry in header.items():
        shape = entry.get("shape") if isinstance(entry, dict) else None
        if not isinstance(shape, list) or not all(isinstance(n, int) and n >= 0 for n in shape):
            raise ValueError(f"{path}: tensor {key!r} has no valid shape")
        if entry.get("dtype") not in _DTYPES + _COUNTS * (".lora_" not in key):
            raise ValueError(
                f"{path}: tensor {key!r}: expected dtype {'/'.join(_DTYPES)}, got "
                f"{entry.get('dtype')!r}"
            )
        if not key.startswith(PREFIX):
            raise ValueError(
                f"{path}: unexpected tensor {key!r}: PEFT's names start with {PREFIX!r}"
            )
        shapes[key.removeprefix(PREFIX)] = tuple(shape)
    return shapes


def check_shapes(
    directory: str | os.PathLike[str],
    shapes: Mapping[str, Shape],
    expected: Mapping[str, Shape],
    besides: Set[str] = frozenset(),
) -> None:
    """Raises ValueError naming missing, unexpected and wrongly shaped tensors."""
    compare_shapes(str(Path(directory) / WEIGHTS_NAME), shapes, expected, besides)


def compare_shapes(
    where: str,
    shapes: Mapping[str, Shape],
    expected: Mapping[str, Shape],
    besides: Set[str] = frozenset(),
) -> None:
    """Compares shapes as ``check_shapes`` does, of an adapter that is elsewhere."""
    missing, extra = expected.keys() - shapes.keys(), shapes.keys() - expected.keys() - besides
    if missing or extra:
        parts = [f"missing {list_some(missing)}"] * bool(missing) + [
            f"unexpected {list_some(extra)}"
        ] * bool(extra)
        if any(".lora_" not in name for name in extra):
            parts.append("PEFT leaves base weights out with save_embedding_layers=False")
        raise ValueError(f"{where}: it does not fit this model and config: {'; '.join(parts)}")
    for name, shape in expected.items():
        if shapes[name] != shape:
            raise ValueError(f"{where}: {name}: expected shape {shape}, got {shapes[name]}")


def read_tensors(
    directory: str | os.PathLike[str],
    expected: Mapping[str, Shape],
    besides: Set[str] = frozenset(),
) -> dict[str, Tensor]:
    """Reads the tensors of the adapter, on the CPU, by name, after ``check_shapes``.

    besides: names of others that may be there, and are not read.
    """
    check_shapes(directory, read_shapes(directory), expected, besides)
    path = _find_file(directory, WEIGHTS_NAME)
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(PREFIX + name) for name in expected}
    except SafetensorError as error:
        raise ValueError(f"{path}: expected a safetensors file: {error}") from None
    # The file may have been exchanged since its header was read.
    check_shapes(directory, {name: tuple(t.shape) for name, t in tensors.items()}, expected)
    return tensors


def write(
    directory: str | os.PathLike[str], config: LoRAConfig, tensors: Mapping[str, Tensor]
) -> None:
    """Writes both files, each in one piece: aside first, then renamed.

    Patterns whose keys overlap are written with layers' full names, so that readers that sort them
    find the same ranks and scalings.
    """
    names = _list_layers(tensors)
    config = replace(
        config,
        rank_pattern=matching.resolve_overlaps(config.rank_pattern, names),
        alpha_pattern=matching.resolve_overlaps(config.alpha_pattern, names),
    )
    folder = as_folder(directory)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"directory: expected a directory, got the file {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    state = {
        PREFIX + name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()
    }
    weights, settings = folder / (WEIGHTS_NAME + ".new"), folder / (CONFIG_NAME + ".new")
    try:
        save_file(state, weights, metadata={"format": "pt"})
        settings.write_text(json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n", "utf-8")
        weights.replace(folder / WEIGHTS_NAME)
        settings.replace(folder / CONFIG_NAME)
    finally:
        weights.unlink(missing_ok=True)
        settings.unlink(missing_ok=True)


def _find_file(directory: str | os.PathLike[str], name: str) -> Path:
    folder = as_folder(directory)
    path = folder / name
    if path.is_file():
        return path
    if name == WEIGHTS_NAME and (folder / "adapter_model.bin").exists():
        raise ValueError(
            f"{folder}: adapter_model.bin is a pickle, which can run code and is never read; "
            "convert it where you trust it: load it with torch.load(..., weights_only=True) and "
            "write it with safetensors.torch.save_file as adapter_model.safetensors"
        )
    raise FileNotFoundError(
        f"directory: expected {name} in {folder}, a local folder (nothing is downloaded)"
        f"{hints.hint_elsewhere(folder, name)}"
    )


def _read_header(path: Path | str, file: BinaryIO, size: int) -> dict[str, dict[str, object]]:
    if size > _MAX_BYTES:
        raise ValueError(f"{path}: expected at most {_MAX_BYTES} bytes, got {size}")
    start, brace = file.read(8), file.read(1)
    # A header's length may well begin like a pickle; a pickle has no brace behind it.
    if brace != b"{" and (start[:2] == b"PK" or start[:1] == b"\x80"):
        raise ValueError(f"{path}: expected safetensors, got a pickle, which is never read")
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > size - 8:
        raise ValueError(f"{path}: truncated or not a safetensors file ({size} bytes)")
    if length > _MAX_HEADER_BYTES:
        raise ValueError(
            f"{path}: expected a header of at most {_MAX_HEADER_BYTES} bytes, got {length}"
        )
    text = brace + file.read(max(0, length - 1))
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected a JSON header: {error}") from None
    if not isinstance(header, dict) or len(header) > _MAX_TENSORS:
        raise ValueError(f"{path}: expected a header of at most {_MAX_TENSORS} tensors")
    header.pop("__metadata__", None)
    return header
