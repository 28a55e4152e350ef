"""Where and with what a figure was measured."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import fastlora
from benchmarks import ROOT
from fastlora.backends import native

# Distributions whose versions stand beside a figure, installed or not.
PEERS = ("peft", "transformers", "unsloth", "liger-kernel", "vllm", "sglang")

_MEASURED = ("fastlora", "kernels", "csrc", "benchmarks")
_WRITTEN = (":(exclude)kernels/tuning", ":(exclude)benchmarks/results")
_SOURCES = (".py", ".h", ".cpp", ".cu", ".cuh")

_CPUINFO = Path("/proc/cpuinfo")


def facts(device: str) -> dict[str, Any]:
    return {
        "device_name": device_name(device),
        "instruction_set": instruction_set(),
        "threads": torch.get_num_threads(),
        "versions": {
            "fastlora": fastlora.__version__,
            "torch": torch.__version__,
            "triton": version("triton") or version("pytorch-triton"),
            "python": platform.python_version(),
            **{name: version(name) for name in PEERS},
        },
        "commit": commit(),
        "tuning": tuning(),
    }


def clocks(device: str) -> dict[str, float | str]:
    """How fast the device runs just now, as far as it says: MHz; and what else wants it.

    Of a GPU also its temperature and the power it draws, of a CPU the machine's load a minute.
    """
    if device == "cuda":
        return _gpu_clocks()
    found: dict[str, float | str] = {"load": os.getloadavg()[0]}
    try:
        cores = re.findall(r"^cpu MHz\s*:\s*(.+)$", _CPUINFO.read_text(), re.MULTILINE)
    except OSError:
        cores = []
    return found | ({"mhz": sum(map(float, cores)) / len(cores)} if cores else {})


def _gpu_clocks() -> dict[str, float | str]:
    fields = {"mhz": "clocks.sm", "memory_mhz": "clocks.mem", "limit_mhz": "clocks.max.sm"}
    fields |= {"celsius": "temperature.gpu", "watts": "power.draw"}
    fields |= {"throttled": "clocks_event_reasons.active"}
    uuid = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
    command = ["nvidia-smi", f"--id=GPU-{uuid}", "--format=csv,noheader,nounits"]
    command.append(f"--query-gpu={','.join(fields.values())}")
    try:
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError) as error:
        return {"unknown": str(error)}
    said = (text.strip() for text in done.stdout.split(","))
    return {
        k: text if k == "throttled" else _number(text)
        for k, text in zip(fields, said, strict=False)
    }


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        said = re.search(r"^model name\s*:\s*(.+)$", _CPUINFO.read_text(), re.MULTILINE)
    except OSError:
        said = None
    return said[1].strip() if said else platform.processor() or platform.machine()


def instruction_set() -> str:
    """What the native kernels use of the CPU, and ``+amx`` where torch finds tiles for bfloat16.

    A virtual machine's CPU may have no better name than its maker's: this tells two apart.
    """
    kernels = "no native" if native.unusable() else native.instruction_set()
    try:
        said = re.search(r"^flags\s*:.*\bamx_bf16\b", _CPUINFO.read_text(), re.MULTILINE)
    except OSError:
        said = None
    return f"{kernels}+amx" if said else kernels


def folder_name(device: str) -> str:
    """The folder of this device's results: the GPU's name, or as ``cpu_folder`` says."""
    if device == "cpu":
        return cpu_folder(device_name("cpu"), instruction_set(), torch.get_num_threads())
    return re.sub(r"[^a-z0-9]+", "-", device_name(device).lower())


def cpu_folder(name: str, instructions: str, threads: int) -> str:
    """``cpu/<name>-<instruction set>/<N>-threads``, in small letters and hyphens."""
    plain = re.sub(r"\((r|tm)\)", "", f"{name} {instructions}".lower())
    cpu = re.sub(r"[^a-z0-9_]+", "-", plain).strip("-")
    return f"cpu/{cpu}/{threads}-thread{'s' if threads > 1 else ''}"


def version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def commit() -> str:
    """The checkout's commit and, where what is measured has changed since, a digest of it.

    Outside a repository the digest alone.
    """
    try:
        if not (ROOT / ".git").exists():
            return f"files {_digest()}"
        changed = _git("status", "--porcelain", "--", *_MEASURED, *_WRITTEN)
        return _git("rev-parse", "HEAD").strip() + (f"+changes {_digest()}" if changed else "")
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown: {error}"


def tuning() -> str:
    """A digest of what was verified and tuned, which decides what runs on a GPU."""
    files = sorted((ROOT / "kernels" / "tuning").glob("*.json"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


def _digest() -> str:
    """Of the sources, without what a check or a tuning on this machine writes."""
    total = hashlib.sha256()
    for folder in _MEASURED:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in _SOURCES:
                total.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return total.hexdigest()[:12]


def _git(*args: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(ROOT), *args], check=True, capture_output=True, text=True, timeout=20
    )
    return done.stdout
