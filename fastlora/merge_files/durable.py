"""Files that are whole or absent, whatever happens to the process or the machine meanwhile."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

# What a file is called until it is whole.
PARTIAL = ".partial"

CHUNK = 1 << 22
# Errors of a full disk; EFBIG is a limit of the process or of the file system.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Written(NamedTuple):
    """Size and digest of a written file."""

    size: int
    sha256: str


def write(path: Path, chunks: Iterable[Any]) -> Written:
    """Writes chunks (bytes, or anything flat of bytes) aside, syncs them, renames.

    Until then ``path`` is what it was. On an error, also one in ``chunks``, what was written aside
    is removed. Raises OSError, saying so where the disk is full.
    """
    partial = path.with_name(path.name + PARTIAL)
    digest, size = hashlib.sha256(), 0
    try:
        with partial.open("wb") as file:
            for chunk in chunks:
                file.write(chunk)
                digest.update(chunk)
                size += len(chunk)
                del chunk  # or it would be held while the next is made
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        sync(path.parent)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in _FULL:
            text = f"{path}: no room to write it ({os.strerror(error.errno)})"
            raise OSError(error.errno, text) from error
        raise
    return Written(size, digest.hexdigest())


def read_chunks(path: Path, start: int = 0, size: int | None = None) -> Iterator[bytes]:
    """Yields ``size`` bytes of a file from ``start``, or all; RuntimeError if it has fewer."""
    with path.open("rb") as file:
        file.seek(start)
        remaining = size
        while remaining is None or remaining > 0:
            chunk = file.read(CHUNK if remaining is None else min(CHUNK, remaining))
            if not chunk:
                if remaining is None:
                    return
                raise RuntimeError(
                    f"{path}: it ends {remaining} bytes early: changed while it was read"
                )
            remaining = None if remaining is None else remaining - len(chunk)
            yield chunk


def digest_file(path: Path) -> Written:
    """Digests a file: equal to what ``write`` returned if the file is unchanged."""
    digest, size = hashlib.sha256(), 0
    for chunk in read_chunks(path):
        digest.update(chunk)
        size += len(chunk)
    return Written(size, digest.hexdigest())


def sync(folder: Path) -> None:
    """Makes renames and removals within the folder last."""
    if os.name != "posix":  # elsewhere a folder cannot be opened
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def hold_lock(path: Path) -> Iterator[None]:
    """Holds the lock file ``path``, which stays; BlockingIOError while another process holds it.

    The lock ends with its process, however that ends.
    """
    try:
        import fcntl
    except ImportError:  # no POSIX, no such locks
        yield
        return
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)
