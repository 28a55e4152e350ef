"""Ending of a process with all that it started, whatever session that runs in.

A process that begins a session of its own leaves its parent's group, but inherits the environment:
a mark there tells it from other processes.
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
# Seconds for a summary and for ending children; then for the kernel, if the GPU hangs, to end it.
_PATIENCE = 5.0


def new_mark() -> str:
    """Makes a value for MARK in a process's environment."""
    return uuid.uuid4().hex


def end(processes: Sequence[tuple[subprocess.Popen[bytes], str]]) -> bool:
    """Ends processes that lead a session, each with its mark; returns whether all are gone.

    They get an interrupt and some seconds; then what still runs is killed.
    """
    for process, _ in processes:
        _signal_group(process, signal.SIGINT)
    _wait(processes)
    for process, _ in processes:
        _signal_group(process, signal.SIGKILL)
    _kill_marked({mark for _, mark in processes})
    return _wait(processes)


def _signal_group(process: subprocess.Popen[bytes], number: int) -> None:
    # Only before it is reaped: afterwards its id may be another process's.
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
    """Kills marked processes, twice: one may have started another during the search."""
    entries = {f"{MARK}={mark}".encode() for mark in marks}
    for _ in range(2):
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if entries.intersection((folder / "environ").read_bytes().split(b"\0")):
                    os.kill(int(folder.name), signal.SIGKILL)
