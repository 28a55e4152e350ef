"""What ``fastlora check`` and ``fastlora tune`` leave behind: rows, with what made them."""

from __future__ import annotations

import importlib
import json
import subprocess
from pathlib import Path
from typing import Any

import torch

import fastlora

_KEYS = ("op", "dtype", "arch", "path", "triton")


def commit() -> str:
    """The checkout's commit, ``+changes`` if it has any; of an installed package its version."""
    package = Path(fastlora.__file__).parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(package.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        # A package may be installed within a repository that is not its own.
        git("ls-files", "--error-unmatch", str(package / "__init__.py"))
        # The rows themselves change no result of the next check.
        sources = ("--", "fastlora", "kernels", ":(exclude)kernels/tuning")
        changes = "+changes" if git("status", "--porcelain", *sources) else ""
        return git("rev-parse", "--short", "HEAD") + changes
    except (OSError, subprocess.CalledProcessError):
        return fastlora.__version__


def poisoned(device: torch.device) -> bool:
    """Whether an error has left the process without a working device."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
        torch.zeros(1, device=device).item()
    except Exception:
        return True
    return False


class Stamps:
    """The verified rows of one GPU, written as they pass, withdrawn where they fail."""

    def __init__(self, device: torch.device, folder: Path | None, quick: bool) -> None:
        self._folder, self._quick, self._written, self._withdrawn = folder, quick, 0, 0
        launch = importlib.import_module("fastlora.kernels.launch")
        self._real = device.type == "cuda" and not launch.interpreted()
        if self._real:
            choice = importlib.import_module("fastlora.kernels.choice")
            self._facts: dict[str, Any] = {
                "arch": launch.arch_of(device), "gpu": choice.gpu_name(device),
                "commit": commit(), "torch": torch.__version__, **choice.versions(),
            }  # fmt: skip

    def note(self, op: str, dtype: str, path: str, *, passed: bool) -> None:
        """An (op, dtype, path) has been checked in all its cases."""
        if not self._real:
            return
        row = {"op": op, "dtype": dtype, "path": path, **self._facts}
        if not passed:
            self._withdrawn += withdraw(row, self._folder)
        elif not self._quick:
            write(row, self._folder)
            self._written += 1

    def summary(self) -> str:
        if not self._real:
            return "nothing is stamped: kernels are verified on a GPU alone"
        where = self._folder or importlib.import_module("fastlora.kernels.records").cache_folder()
        said = f"{self._written} rows of verified paths written to {where}"
        said = "nothing is stamped by a quick check" if self._quick else said
        return said + (f", {self._withdrawn} withdrawn" if self._withdrawn else "")


def write(row: dict[str, Any], folder: Path | None) -> None:
    records = importlib.import_module("fastlora.kernels.records")
    records.write(records.VERIFIED, [row], _KEYS, folder)
    importlib.import_module("fastlora.kernels.choice").forget()


def withdraw(row: dict[str, Any], folder: Path | None) -> int:
    """Removes the rows that say of this one that it passed; how many there were."""
    records = importlib.import_module("fastlora.kernels.records")
    file = (folder or records.cache_folder()) / records.VERIFIED
    try:
        rows = [r for r in json.loads(file.read_text()) if isinstance(r, dict)]
    except (OSError, ValueError):
        return 0
    kept = [r for r in rows if any(r.get(key) != row[key] for key in _KEYS)]
    if len(kept) < len(rows):
        file.unlink()
        if kept:
            records.write(records.VERIFIED, kept, _KEYS, folder)
        importlib.import_module("fastlora.kernels.choice").forget()
    return len(rows) - len(kept)
