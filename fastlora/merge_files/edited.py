"""A merged model's config and index, which say so where its dtype is another than the base's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch


def index(path: Path, nbytes: int, dtype: torch.dtype | None) -> list[bytes]:
    """The index of shards, whose size another dtype changes; what it says of them stays."""
    text = path.read_bytes()
    if dtype is None:
        return [text]
    values = json.loads(text)
    values["metadata"] = (values.get("metadata") or {}) | {"total_size": nbytes}
    return [json.dumps(values, indent=2, sort_keys=True).encode() + b"\n"]


def config(path: Path, dtype: torch.dtype | None) -> list[bytes]:
    """The model's config, which names another dtype."""
    text = path.read_bytes()
    if dtype is None:
        return [text]
    values, name = json.loads(text), str(dtype).removeprefix("torch.")
    if not _set_dtype(values, name):
        values["torch_dtype"] = name  # which newer and older transformers read
    return [json.dumps(values, indent=2).encode() + b"\n"]


def _set_dtype(config: dict[str, Any], name: str) -> bool:
    """Exchanges the dtype, also that of inner models; whether the outer one had any."""
    known = [key for key in ("dtype", "torch_dtype") if isinstance(config.get(key), str)]
    config.update(dict.fromkeys(known, name))
    for inner in config.values():
        if isinstance(inner, dict):
            _set_dtype(inner, name)
    return bool(known)
