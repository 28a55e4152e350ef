"""What was measured where: verified rows and tuned configs, those that ship and the user's own.

``kernels/tuning/verified.json`` holds rows (op, dtype, arch, path), each with the GPU and commit
that passed; ``kernels/tuning/<gpu>.json`` holds the fastest configs of that GPU by shape. The
commands ``fastlora check`` and ``fastlora tune`` write the same files into the user's cache folder
(``FASTLORA_CACHE``, else ``$XDG_CACHE_HOME/fastlora``, else ``~/.cache/fastlora``), whose rows come
first and hold for the triton that made them.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

SHIPPED = Path(__file__).parents[1] / "tuning"
VERIFIED = "verified.json"

Row = dict[str, Any]


def cache_folder() -> Path:
    if os.environ.get("FASTLORA_CACHE"):
        return Path(os.environ["FASTLORA_CACHE"])
    if os.environ.get("XDG_CACHE_HOME"):
        return Path(os.environ["XDG_CACHE_HOME"]) / "fastlora"
    try:
        return Path.home() / ".cache" / "fastlora"
    except RuntimeError:  # a user without a home, as containers have
        return Path(tempfile.gettempdir()) / "fastlora"


def file_of(gpu: str) -> str:
    """The name of a GPU's file: "NVIDIA H100 80GB HBM3" is nvidia-h100-80gb-hbm3.json."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") + ".json"


def read(name: str, versions: Row) -> list[Row]:
    """The user's rows made with these versions, then those that ship; damaged files hold none."""
    own = [row for row in _rows(cache_folder() / name) if versions.items() <= row.items()]
    return own + _rows(SHIPPED / name)


def verified(
    op: str, dtype: str | None, arch: int, paths: tuple[str, ...], versions: Row
) -> tuple[str, ...]:
    """Lists the ``paths`` of op that passed on such a GPU, in this dtype or, if None, in any."""
    columns = {"op": op, "arch": arch} | ({"dtype": dtype} if dtype else {})
    passed: dict[tuple[Any, Any], bool] = {}
    for row in read(VERIFIED, versions):
        if columns.items() <= row.items():
            # The user's own rows come first, and say more of this machine than those that ship.
            passed.setdefault((row.get("dtype"), row.get("path")), row.get("passed", True))
    good = dict.fromkeys(path for (_, path), well in passed.items() if well and path in paths)
    return tuple(good)


def write(name: str, rows: list[Row], keys: tuple[str, ...], folder: Path | None = None) -> Path:
    """Adds rows to a file of the cache, or of ``folder``; a row of the same keys is replaced."""
    folder = folder or cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        return _write(name, rows, keys, folder)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Two processes that write at once would each undo the other's rows."""
    with (folder / ".lock").open("w") as file:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _write(name: str, rows: list[Row], keys: tuple[str, ...], folder: Path) -> Path:
    by_keys = {tuple(row.get(key) for key in keys): row for row in [*_rows(folder / name), *rows]}
    lines = [json.dumps(by_keys[key]) for key in sorted(by_keys, key=str)]
    # Whoever reads meanwhile sees the old file or the new one.
    handle, new = tempfile.mkstemp(dir=folder, suffix=".new")
    try:
        with os.fdopen(handle, "w") as file:
            file.write("[\n" + ",\n".join(lines) + "\n]\n")
        os.chmod(new, 0o644)
        os.replace(new, folder / name)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(new)
        raise
    return folder / name


def _rows(file: Path) -> list[Row]:
    try:
        rows = json.loads(file.read_text())
    except (OSError, ValueError):
        return []
    return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
