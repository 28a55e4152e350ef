"""Ending a process with all that it started, wherever that went.

A process that begins a session of its own leaves its parent's group; what it inherits all the same
is the environment, where a mark tells it from anybody else's.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
import uuid
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

MARK = "FASTLORA_PART"
# To print a summary, or to end children; then for the kernel, with a GPU that hangs, to end it.
_PATIENCE = 5.0


def new_mark() -> str:
    """A value for MARK in a process's environment."""
    return uuid.uuid4().hex


def end(processes: Sequence[tuple[subprocess.Popen[bytes], str]]) -> bool:
    """Ends processes that lead a session, given with their marks; whether all of them are gone.

    They get an interrupt and some seconds; then all that is left of them is killed.
    """
    for process, _ in processes:
        _signal_group(process, signal.SIGINT)
    _wait(processes)
    for process, _ in processes:
        _signal_group(process, signal.SIGKILL)
    _kill_marked({mark for _, mark in processes})
    return _wait(processes)


def _signal_group(process: subprocess.Popen[bytes], number: int) -> None:
    # Only while it is not reaped: afterwards its id may be another's.
    if process.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)


def _wait(processes: Iterable[tuple[subprocess.Popen[bytes], str]]) -> bool:
    until = time.monotonic() + _PATIENCE
    for process, _ in processes:
        with suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, until - time.monotonic()))
    return all(process.poll() is not None for process, _ in processes)


def _kill_marked(marks: set[str]) -> None:
    """Twice: one may have started another while they were looked for."""
    wanted = {f"{MARK}={mark}".encode() for mark in marks}
    for _ in range(2):
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if wanted.intersection((folder / "environ").read_bytes().split(b"\0")):
                    os.kill(int(folder.name), signal.SIGKILL)
