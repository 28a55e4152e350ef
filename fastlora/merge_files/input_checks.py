"""Checks of a merge's inputs: adapters in all accepted forms, and a disk with room."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from fastlora.merge_files import durable, journal

Folder = str | os.PathLike[str]


def read_pairs(adapters: object) -> list[tuple[Folder, float]]:
    """Reads folders and weights; TypeError or ValueError for anything else."""
    items = [adapters] if isinstance(adapters, str | os.PathLike) else adapters
    if isinstance(items, Mapping) or not isinstance(items, Sequence):
        raise TypeError(
            "adapters: expected a folder, or a list of folders and of pairs (folder, weight), got "
            f"{type(adapters).__name__}"
        )
    if not items:
        raise ValueError("adapters: expected one or more, got none")
    pairs = []
    for i, item in enumerate(items):
        pair = (item, 1.0) if isinstance(item, str | os.PathLike) else item
        folder = pair[0] if isinstance(pair, tuple | list) and len(pair) == 2 else None
        if not isinstance(folder, str | os.PathLike):
            raise TypeError(
                f"adapters[{i}]: expected a folder or a pair (folder, weight), got {item!r}"
            )
        pairs.append(tuple(pair))
    return pairs


def check_room(out: Path, sizes: Mapping[Path, int]) -> None:
    """Raises OSError where the disk has no room for files of these sizes in ``out``."""
    needed = sum(sizes.values())
    if journal.is_unfinished(out):
        # What an earlier run has written, or has begun to and will be written over.
        for path in sizes:
            there = (path, path.with_name(path.name + durable.PARTIAL))
            needed -= max((path.stat().st_size for path in there if path.is_file()), default=0)
    existing = next(folder for folder in (out, *out.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(existing).free
    if needed > free:
        text = f"out: {out} needs {needed:,} bytes, {free:,} are free at {existing}"
        raise OSError(errno.ENOSPC, text)
