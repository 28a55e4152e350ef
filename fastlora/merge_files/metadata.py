"""Index and config of a merged model, made from the base's."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastlora.merge_files.plan import Plan
from fastlora.merge_files.shards import Entry


def make_index(path: Path, entries: Sequence[Entry], steps: Plan) -> list[bytes]:
    """Makes the index of the merged files from the base's."""
    text = path.read_bytes()
    if steps.dtype is None and steps.vocabulary.size is None:
        return [text]
    index = json.loads(text)
    sizes = {"total_size": sum(entry.nbytes for entry in entries)}
    if "total_parameters" in (index.get("metadata") or {}):
        sizes["total_parameters"] = sum(math.prod(entry.shape) for entry in entries)
    index["metadata"] = (index.get("metadata") or {}) | sizes
    return [json.dumps(index, indent=2, sort_keys=True).encode() + b"\n"]


def make_config(path: Path, steps: Plan) -> list[bytes]:
    """Makes the config of the merged model from the base's."""
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
    """Sets the dtype, also of inner models; returns whether the outer config had any."""
    known = [key for key in ("dtype", "torch_dtype") if isinstance(config.get(key), str)]
    config.update(dict.fromkeys(known, name))
    for inner in config.values():
        if isinstance(inner, dict):
            _set_dtype(inner, name)
    return bool(known)
