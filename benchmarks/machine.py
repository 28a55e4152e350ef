"""Where and with what a figure was measured."""

from __future__ import annotations

import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import fastlora

_ROOT = Path(__file__).parent.parent


def facts(device: str) -> dict[str, Any]:
    return {
        "device_name": device_name(device),
        "threads": torch.get_num_threads(),
        "versions": {
            "fastlora": fastlora.__version__,
            "torch": torch.__version__,
            "triton": _version("triton") or _version("pytorch-triton"),
            "peft": _version("peft"),
            "python": platform.python_version(),
        },
        "commit": _commit(),
    }


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        said = re.search(
            r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE
        )
    except OSError:
        said = None
    return said[1].strip() if said else platform.processor() or platform.machine()


def folder_name(device: str) -> str:
    """The folder of results: ``cpu/N-threads``, or the GPU's name in small letters and hyphens."""
    if device == "cpu":
        threads = torch.get_num_threads()
        return f"cpu/{threads}-thread{'s' if threads > 1 else ''}"
    return re.sub(r"[^a-z0-9]+", "-", device_name(device).lower())


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The checkout's commit, marked where files have changed since; None outside a repository."""
    if not (_ROOT / ".git").exists():
        return None
    try:
        commit = _git("rev-parse", "HEAD").strip()
        return commit + (
            "+changes" if _git("status", "--porcelain", "--", "fastlora", "kernels") else ""
        )
    except (OSError, subprocess.SubprocessError):
        return None


def _git(*args: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(_ROOT), *args], check=True, capture_output=True, text=True, timeout=20
    )
    return done.stdout
