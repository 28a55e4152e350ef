"""What ``fastlora check`` and ``fastlora tune`` leave behind: rows, with what made them."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import fastlora

# Modules that say which paths were verified, and by what a row of them is bound.
_TRITON, _CUDA = "fastlora.kernels.choose.choice", "fastlora.backends.cuda.paths"
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
        sources = ("--", "fastlora", "kernels", "csrc", ":(exclude)kernels/tuning")
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


def versions_of(path: str) -> dict[str, str]:
    """What a row of this path holds for: the kernels as they are, by whom they were compiled."""
    module = _CUDA if path.startswith("cuda_") else _TRITON
    return importlib.import_module(module).versions()


class Stamps:
    """The rows of one GPU, written as each path has passed or failed."""

    def __init__(self, device: torch.device, folder: Path | None, quick: bool) -> None:
        self._folder, self._quick, self._written, self._failed = folder, quick, 0, 0
        self._real = device.type == "cuda"
        if self._real:
            major, minor = torch.cuda.get_device_capability(device)
            self._facts: dict[str, Any] = {
                "arch": 10 * major + minor, "gpu": torch.cuda.get_device_name(device),
                "commit": commit(), "torch": torch.__version__,
            }  # fmt: skip

    def note(self, op: str, dtype: str, path: str, *, passed: bool) -> None:
        """An (op, dtype, path) has been checked in all its cases: it passed, or was wrong."""
        if not self._real or self._quick:
            return
        # A failure is kept too: it outweighs a row that says of another such GPU that all was well.
        row = {"op": op, "dtype": dtype, "path": path, "passed": passed, **self._facts}
        write(versions_of(path) | row, self._folder)
        self._written += passed
        self._failed += not passed

    def summary(self) -> str:
        if not self._real:
            return "nothing is stamped: kernels are verified on a GPU alone"
        where = (
            self._folder
            or importlib.import_module("fastlora.kernels.choose.records").cache_folder()
        )
        said = f"{self._written} rows of verified paths written to {where}"
        said = "nothing is stamped by a quick check" if self._quick else said
        return said + (f", {self._failed} of paths that failed" if self._failed else "")


def write(row: dict[str, Any], folder: Path | None) -> None:
    """Adds a row, or puts it in the place of the earlier one about the same path."""
    records = importlib.import_module("fastlora.kernels.choose.records")
    records.write(records.VERIFIED, [row], _KEYS, folder)
    for module in (_TRITON, _CUDA):
        if module in sys.modules:
            sys.modules[module].forget()
