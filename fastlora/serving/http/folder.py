"""``Folder``: adapters on disk, each a folder of that name, read from handles and never by path.

Folder and files are opened once, without following links, relative to the folder's own handle. What
is checked is what was read: a name that is exchanged meanwhile changes nothing.
"""

from __future__ import annotations

import json
import os
import stat
from io import BytesIO
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from fastlora.adapters.files import CONFIG_NAME, WEIGHTS_NAME, check_name, read_header

_CONFIG_BYTES = 1 << 20
_OPEN_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
# Without waiting: a pipe under an adapter's name must not hold anything up.
_OPEN_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class AdapterError(ValueError):
    """An adapter that cannot be read; the reason names no path outside the adapter's folder."""


class Folder:
    """A folder of adapters, open until it is closed. most_bytes: of one's weights."""

    def __init__(self, path: str | os.PathLike[str], most_bytes: int = 1 << 30) -> None:
        self._handle = os.open(Path(path), _OPEN_FOLDER)
        self._most_bytes = most_bytes

    def close(self) -> None:
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def list_names(self) -> list[str]:
        """Lists the adapters: folders with a config that are no links, sorted."""
        with os.scandir(self._handle) as entries:
            names = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
        return sorted(name for name in names if self._has(name))

    def read(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Reads an adapter's tensors and its config's fields; AdapterError where that fails."""
        folder = self._open_folder(name)
        try:
            config = _parse_config(_read(folder, name, CONFIG_NAME, _CONFIG_BYTES))
            data = _read(folder, name, WEIGHTS_NAME, self._most_bytes)
        finally:
            os.close(folder)
        try:
            read_header(WEIGHTS_NAME, BytesIO(data), len(data))
            return load(data), config
        except (ValueError, SafetensorError) as error:
            raise AdapterError(str(error)) from None

    def _has(self, name: str) -> bool:
        try:
            folder = self._open_folder(name)
        except AdapterError:
            return False
        try:
            status = os.stat(CONFIG_NAME, dir_fd=folder, follow_symlinks=False)
        except OSError:
            return False
        finally:
            os.close(folder)
        return stat.S_ISREG(status.st_mode)

    def _open_folder(self, name: str) -> int:
        try:
            return os.open(check_name(name), _OPEN_FOLDER | os.O_NOFOLLOW, dir_fd=self._handle)
        except ValueError as error:
            raise AdapterError(str(error)) from None
        except OSError as error:
            raise AdapterError(
                f"expected a folder of that name among the adapters, and no link ({error.strerror})"
            ) from None


def _read(folder: int, name: str, file_name: str, most: int) -> bytes:
    """Reads a whole file of at most ``most`` bytes, through one handle."""
    try:
        handle = os.open(file_name, _OPEN_FILE, dir_fd=folder)
    except OSError as error:
        raise AdapterError(
            f"{file_name}: expected a file, and no link ({error.strerror})"
        ) from None
    with os.fdopen(handle, "rb") as file:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise AdapterError(f"{file_name}: expected a file")
        if os.fstat(handle).st_size > most:
            raise AdapterError(f"{file_name}: expected at most {most} bytes")
        data = file.read(most + 1)
    if len(data) > most:
        raise AdapterError(f"{file_name}: expected at most {most} bytes")
    return data


def _parse_config(data: bytes) -> dict[str, Any]:
    try:
        values = json.loads(data)
    except (ValueError, RecursionError):
        raise AdapterError(f"{CONFIG_NAME}: expected JSON") from None
    if not isinstance(values, dict):
        raise AdapterError(f"{CONFIG_NAME}: expected a JSON object")
    return values
