"""Lines of results: one for each case and provider, JSON, a file a suite."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

Line = dict[str, Any]


def write(line: Line, file: Path | None) -> None:
    """Appends the line in one piece, or prints it where there is no file."""
    text = json.dumps(_replace_nonfinite(line), allow_nan=False)
    if file is None:
        print(text, flush=True)
        return
    # One write to the end: a kill leaves whole lines behind.
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(descriptor, (text + "\n").encode())
    finally:
        os.close(descriptor)


def read(file: Path) -> list[Line]:
    """Reads the lines of a file, none where there is no file.

    Raises ValueError where one is not a line of results.
    """
    if not file.exists():
        return []
    lines = []
    for number, text in enumerate(file.read_text().splitlines(), 1):
        try:
            line = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}, line {number}: expected JSON, {error}") from error
        if not isinstance(line, dict) or "case" not in line:
            raise ValueError(f"{file}, line {number}: expected a line of results")
        lines.append(line)
    return lines


def read_all(path: Path) -> list[Line]:
    """Reads the lines of a file, or of a folder's files.

    Raises FileNotFoundError where there is none, ValueError as ``read``.
    """
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    if not files or not files[0].exists():
        raise FileNotFoundError(f"expected results such as linear.jsonl, found none at {path}")
    return [line for file in files for line in read(file)]


def filter_file(file: Path, keeps: Callable[[Line], bool]) -> None:
    """Keeps the lines for which ``keeps`` holds; the file is replaced in one piece."""
    if not file.exists():
        return
    new = file.with_suffix(".new")
    new.write_text("".join(json.dumps(line) + "\n" for line in read(file) if keeps(line)))
    os.replace(new, file)


def _replace_nonfinite(value: Any) -> Any:
    """Replaces numbers that are not finite by text, as JSON has no NaN."""
    if isinstance(value, dict):
        return {k: _replace_nonfinite(v) for k, v in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
