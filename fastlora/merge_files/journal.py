"""Notes of an unfinished merge in its output folder: its settings and finished files."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import astuple
from pathlib import Path
from typing import Any

from fastlora.functional.fidelity import Fidelity
from fastlora.merge_files import durable
from fastlora.merge_files.durable import Written

JOURNAL = ".fastlora-merge.json"
LOCK = ".fastlora-merge.lock"


class Journal:
    """Journal of a merge. run: all that decides the output's bytes, by name. Writes at once."""

    def __init__(self, folder: Path, run: Mapping[str, Any], finished: dict[str, Any]) -> None:
        self.folder, self._run, self._finished = folder, run, finished

    def find_finished(self, name: str) -> dict[str, Fidelity] | None:
        """Returns the fidelity of a file's layers, if the file is there and as it was written."""
        note, path = self._finished.get(name), self.folder / name
        if note is None or not path.is_file() or path.stat().st_size != note["written"][0]:
            return None
        if durable.digest_file(path) != Written(*note["written"]):
            return None
        return {layer: Fidelity(*values) for layer, values in note["fidelity"].items()}

    def finish(self, name: str, written: Written, fidelity: Mapping[str, Fidelity]) -> None:
        """Notes that a file is whole."""
        values = {layer: astuple(layer_fidelity) for layer, layer_fidelity in fidelity.items()}
        self._finished[name] = {"written": written, "fidelity": values}
        self.write()

    def write(self) -> None:
        notes = {"run": self._run, "finished": self._finished}
        durable.write(self.folder / JOURNAL, [json.dumps(notes).encode()])

    def close(self) -> None:
        """Removes the notes, when all files are whole."""
        for name in (JOURNAL, LOCK):
            (self.folder / name).unlink(missing_ok=True)
        durable.sync(self.folder)


@contextmanager
def open_journal(folder: Path, run: Mapping[str, Any]) -> Iterator[Journal]:
    """Makes the folder, or goes on in one that holds an unfinished merge that is the same ``run``.

    Raises FileExistsError for any other folder, BlockingIOError while another process writes to it.
    """
    if os.path.lexists(folder):
        _check_unfinished(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(error.errno, f"out: {folder} cannot be made: {error.strerror}") from error
    with _hold_lock(folder):
        try:
            # Again: the process that had the lock may have finished in the meantime.
            _check_unfinished(folder)
        except FileExistsError:
            (folder / LOCK).unlink(missing_ok=True)
            raise
        journal = Journal(folder, run, _read_notes(folder, run))
        journal.write()
        yield journal


def is_unfinished(folder: Path) -> bool:
    """Whether the folder holds a merge that has begun."""
    return (folder / JOURNAL).is_file()


@contextmanager
def _hold_lock(folder: Path) -> Iterator[None]:
    try:
        with durable.hold_lock(folder / LOCK):
            yield
    except BlockingIOError:
        raise BlockingIOError(f"out: another process is merging into {folder}") from None


def _check_unfinished(folder: Path) -> None:
    if not folder.is_dir():
        raise FileExistsError(f"out: expected a new folder, {folder} is a file")
    names = set(os.listdir(folder))
    # A merge that was killed at once had not come to its notes.
    if JOURNAL not in names and names - {LOCK, JOURNAL + durable.PARTIAL}:
        holds = "a model already" if "config.json" in names else f"{min(names - {LOCK})}"
        raise FileExistsError(
            f"out: expected a new folder or an unfinished merge, {folder} holds {holds}"
        )


def _read_notes(folder: Path, run: Mapping[str, Any]) -> dict[str, Any]:
    """Reads what the same run has finished; FileExistsError if the notes are of another."""
    if not is_unfinished(folder):
        return {}
    try:
        notes = json.loads((folder / JOURNAL).read_text(encoding="utf-8"))
        before, finished = notes["run"], notes["finished"]
    except (ValueError, KeyError, TypeError):
        raise FileExistsError(f"out: {folder / JOURNAL} is damaged: delete {folder}") from None
    now = json.loads(json.dumps(run))
    changed = [name for name in now if before.get(name) != now[name]]
    if changed:
        raise FileExistsError(
            f"out: {folder} holds an unfinished merge of another kind (not the same "
            f"{', '.join(changed)}): delete it, or repeat that command to finish it"
        )
    return finished
