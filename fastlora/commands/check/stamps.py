"""Rows that ``fastlora check`` and ``fastlora tune`` write, with what made them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import fastlora
from fastlora.kernels.choose import records  # pyright: ignore[reportMissingImports]

# Modules that say which paths were verified, and by what a row of them is bound.
_TRITON, _CUDA = "fastlora.kernels.choose.choice", "fastlora.backends.cuda.paths"
_KEYS = ("op", "dtype", "arch", "path", "triton")


def find_commit() -> str:
    """Returns the checkout's commit, ``+changes`` if it has any; an installed package's version."""
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


def is_lost(device: torch.device) -> bool:
    """Whether an error has left the process without a working device."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
        torch.zeros(1, device=device).item()
    except Exception:
        return True
    return False


def find_versions(path: str) -> dict[str, str]:
    """Returns the versions of kernels and compiler that a row of this path is valid for."""
    if path.startswith("cuda_"):
        from fastlora.backends.cuda import paths

        return paths.versions()
    from fastlora.commands.kernels import choice

    return choice.versions()


def cache_folder() -> Path:
    """Returns the folder of this machine's rows, where no other is named."""
    return records.cache_folder()


class Stamps:
    """Rows of one GPU, written as each path has passed or failed."""

    def __init__(self, device: torch.device, folder: Path | None, quick: bool) -> None:
        self._folder, self._quick, self._written, self._failed = folder, quick, 0, 0
        self._real = device.type == "cuda"
        if self._real:
            major, minor = torch.cuda.get_device_capability(device)
            self._facts: dict[str, Any] = {
                "arch": 10 * major + minor, "gpu": torch.cuda.get_device_name(device),
                "commit": find_commit(), "torch": torch.__version__,
            }  # fmt: skip

    def note(self, op: str, dtype: str, path: str, *, passed: bool) -> None:
        """Writes that an (op, dtype, path) passed all its cases, or was wrong in one."""
        if not self._real or self._quick:
            return
        # Failures are written too: one outweighs a row that passed on another such GPU.
        row = {"op": op, "dtype": dtype, "path": path, "passed": passed, **self._facts}
        write(find_versions(path) | row, self._folder)
        self._written += passed
        self._failed += not passed

    def summarize(self) -> str:
        if not self._real:
            return "nothing is stamped: kernels are verified on a GPU alone"
        if self._quick:
            return "nothing is stamped by a quick check"
        folder = self._folder or cache_folder()
        text = f"{self._written} rows of verified paths written to {folder}"
        return text + (f", {self._failed} of paths that failed" if self._failed else "")


def write(row: dict[str, Any], folder: Path | None) -> None:
    """Adds a row, or puts it in the place of the earlier one about the same path."""
    records.write(records.VERIFIED, [row], _KEYS, folder)
    for module in (_TRITON, _CUDA):
        if module in sys.modules:
            sys.modules[module].forget()
