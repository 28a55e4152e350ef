"""Weights of a model on disk: one safetensors file, or several with an index, as transformers has.

Headers are read, tensors one at a time: nothing of a file's size is held.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastlora.adapters.files import read_json
from fastlora.adapters.hints import check_content
from fastlora.backends.dtypes import CODES
from fastlora.merge_files import durable

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"

CODE_OF = {dtype: code for code, dtype in CODES.items()}
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True)
class Entry:
    """Tensor of a file: dtype is safetensors' code, offset and nbytes say where its bytes lie."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def floating(self) -> bool:
        return self.dtype in CODES

    @property
    def itemsize(self) -> float:
        return self.nbytes / max(1, math.prod(self.shape))

    def as_dtype(self, dtype: torch.dtype | None) -> Entry:
        """Returns the entry of the converted tensor; only float16 to float64 are converted."""
        if dtype is None or not self.floating:
            return self
        nbytes = self.nbytes // CODES[self.dtype].itemsize * dtype.itemsize
        return replace(self, dtype=CODE_OF[dtype], nbytes=nbytes)


@dataclass(frozen=True)
class Shard:
    """One safetensors file. start: its first bytes up to the tensors, header included."""

    path: Path
    start: bytes
    metadata: dict[str, str]
    tensors: dict[str, Entry]

    def read(self, name: str) -> Tensor:
        """Reads a float tensor into new memory on the CPU."""
        entry = self.tensors[name]
        tensor = torch.empty(entry.shape, dtype=CODES[entry.dtype])
        with self.path.open("rb", buffering=0) as file:
            file.seek(entry.offset)
            remaining = memoryview(view_bytes(tensor))
            while remaining and (count := file.readinto(remaining)):
                remaining = remaining[count:]
        if remaining:
            raise RuntimeError(f"{self.path}: it ends within {name!r}: changed while it was read")
        return tensor

    def read_bytes(self, name: str) -> Iterator[bytes]:
        """Yields the stored bytes of a tensor of any dtype."""
        entry = self.tensors[name]
        return durable.read_chunks(self.path, entry.offset, entry.nbytes)


@dataclass(frozen=True)
class Checkpoint:
    """Folder that transformers loads: its weights and its config."""

    folder: Path
    shards: tuple[Shard, ...]
    index: Path | None
    config: dict[str, Any]
    holder: dict[str, Shard] = field(default_factory=dict)  # of each tensor

    def entry(self, name: str) -> Entry:
        return self.holder[name].tensors[name]

    def option(self, name: str, default: object = None) -> object:
        """Returns a setting of the config, or of its text model's."""
        text = self.config.get("text_config")
        inner = text.get(name, default) if isinstance(text, dict) else default
        return self.config.get(name, inner)

    def has_same_bytes(self, first: str, second: str) -> bool:
        """Whether two tensors have the same bytes, two dtypes compared in the narrower."""
        shards = self.holder[first], self.holder[second]
        codes = {self.entry(name).dtype for name in (first, second)}
        if len(codes) > 1 and codes <= CODES.keys():
            dtype = min((CODES[code] for code in codes), key=lambda dtype: dtype.itemsize)
            one, other = (self.holder[name].read(name).to(dtype) for name in (first, second))
            return torch.equal(one, other)
        pairs = zip(shards[0].read_bytes(first), shards[1].read_bytes(second), strict=True)
        return self.entry(first).nbytes == self.entry(second).nbytes and all(
            a == b for a, b in pairs
        )


def open_checkpoint(folder: str | os.PathLike[str]) -> Checkpoint:
    """Reads config, index and headers, and checks that they agree; no tensor is read.

    Raises FileNotFoundError or ValueError naming what is missing or wrong; pickles are never read.
    """
    base = Path(folder)
    if not base.is_dir():
        raise FileNotFoundError(f"base: expected a folder with a model, got {base}")
    index = None
    names = [WEIGHTS_NAME]
    if not (base / WEIGHTS_NAME).is_file():
        index = base / INDEX_NAME
        if not index.is_file():
            raise FileNotFoundError(_explain_no_weights(base))
        names = sorted(set(_read_weight_map(index).values()))
    if not (base / CONFIG_NAME).is_file():
        raise FileNotFoundError(f"base: expected {CONFIG_NAME} in {base}")
    shards = tuple(open_shard(base / name) for name in names)
    holder: dict[str, Shard] = {}
    for shard in shards:
        for name in shard.tensors:
            if name in holder:
                raise ValueError(f"{shard.path}: {name!r} is in {holder[name].path.name} too")
            holder[name] = shard
    for name, file in _read_weight_map(index).items() if index else ():
        if name not in holder or holder[name].path.name != file:
            raise ValueError(f"{index}: {name!r} is not in {file}")
    config = read_json(base / CONFIG_NAME)
    return Checkpoint(base, shards, index, config, holder)


def open_shard(path: Path) -> Shard:
    """Reads a safetensors file's header, which the library has checked; ValueError if bad."""
    if not path.is_file():
        raise FileNotFoundError(f"base: expected {path.name} in {path.parent}")
    check_content(path)
    try:
        # Where every tensor lies, and that the file ends where the last one does.
        with safe_open(path, framework="pt"):
            pass
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path}: truncated or not a safetensors file: {error}") from None
    with path.open("rb") as file:
        length = file.read(8)
        text = file.read(int.from_bytes(length, "little"))
    header = json.loads(text)
    metadata = header.pop("__metadata__", None) or {}
    first = 8 + len(text)
    entries = [
        Entry(name, e["dtype"], tuple(e["shape"]), first + e["data_offsets"][0], _measure_span(e))
        for name, e in header.items()
    ]
    entries.sort(key=lambda entry: (entry.offset, entry.nbytes))
    return Shard(path, length + text, metadata, {entry.name: entry for entry in entries})


def make_start(entries: Iterable[Entry], metadata: dict[str, str]) -> bytes:
    """Makes the first bytes of a file that holds tensors in this order: length and header."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    for entry in entries:
        header[entry.name] = {
            "dtype": entry.dtype,
            "shape": entry.shape,
            "data_offsets": [offset, offset + entry.nbytes],
        }
        offset += entry.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust(-(-len(text) // 8) * 8)  # so that the tensors are aligned
    return len(text).to_bytes(8, "little") + text


def view_bytes(tensor: Tensor) -> Any:
    """Returns a tensor's bytes as a flat numpy array; shares memory if it is contiguous."""
    return tensor.contiguous().view(-1).view(torch.uint8).numpy()


def _measure_span(entry: dict[str, Any]) -> int:
    start, end = entry["data_offsets"]
    return end - start


def _read_weight_map(index: Path) -> dict[str, str]:
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ValueError(f"{index}: expected a weight_map that is not empty")
    for name, file in names.items():
        if (
            not isinstance(file, str)
            or Path(file).name != file
            or not file.endswith(".safetensors")
        ):
            raise ValueError(
                f"{index}: {name!r}: expected a .safetensors file beside, got {file!r}"
            )
    return names


def _explain_no_weights(base: Path) -> str:
    text = f"base: expected {WEIGHTS_NAME} or {INDEX_NAME} in {base}"
    pickles = sorted(path.name for path in base.iterdir() if path.suffix in _PICKLES)
    if pickles:
        text += (
            f"; {pickles[0]} is a pickle, which can run code and is never read: convert it where "
            "you trust it, with AutoModelForCausalLM.from_pretrained(…).save_pretrained(…)"
        )
    return text
