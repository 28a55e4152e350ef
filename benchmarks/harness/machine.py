"""The machine and the versions that a figure was measured with."""

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
from fastlora.backends.cpu.choices import cpu_name

# Distributions whose versions stand beside a figure, installed or not.
PEERS = ("peft", "transformers", "unsloth", "liger-kernel", "vllm", "sglang")

_MEASURED = ("fastlora", "kernels", "csrc", "benchmarks")
_WRITTEN = (":(exclude)kernels/tuning", ":(exclude)benchmarks/results")
_SOURCES = (".py", ".h", ".cpp", ".cu", ".cuh")

_CPUINFO = Path("/proc/cpuinfo")


def collect_facts(device: str) -> dict[str, Any]:
    return {
        "device_name": find_device_name(device),
        "instruction_set": find_instruction_set(),
        "threads": torch.get_num_threads(),
        "versions": {
            "fastlora": fastlora.__version__,
            "torch": torch.__version__,
            "triton": find_version("triton") or find_version("pytorch-triton"),
            "python": platform.python_version(),
            **{name: find_version(name) for name in PEERS},
        },
        "commit": find_commit(),
        "tuning": digest_tuning(),
    }


def read_clocks(device: str) -> dict[str, float | str]:
    """Reads the device's clock in MHz, as far as it is known.

    For a GPU also its temperature and power, for a CPU the machine's load in the last minute.
    """
    if device == "cuda":
        return _read_gpu_clocks()
    clocks: dict[str, float | str] = {"load": os.getloadavg()[0]}
    try:
        cores = re.findall(r"^cpu MHz\s*:\s*(.+)$", _CPUINFO.read_text(), re.MULTILINE)
    except OSError:
        cores = []
    return clocks | ({"mhz": sum(map(float, cores)) / len(cores)} if cores else {})


def _read_gpu_clocks() -> dict[str, float | str]:
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
    values = (text.strip() for text in done.stdout.split(","))
    return {
        k: text if k == "throttled" else _parse_number(text)
        for k, text in zip(fields, values, strict=False)
    }


def _parse_number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def find_device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    return cpu_name()


def find_instruction_set() -> str:
    """Names the native kernels' instruction set, with ``+amx`` where torch has bfloat16 tiles.

    A virtual machine's CPU may be named after its maker alone: this tells two apart.
    """
    kernels = "no native" if native.unusable() else native.instruction_set()
    try:
        match = re.search(r"^flags\s*:.*\bamx_bf16\b", _CPUINFO.read_text(), re.MULTILINE)
    except OSError:
        match = None
    return f"{kernels}+amx" if match else kernels


def name_folder(device: str) -> str:
    """Names the folder of this device's results: the GPU's name, or as ``name_cpu_folder``."""
    if device == "cpu":
        return name_cpu_folder(
            find_device_name("cpu"), find_instruction_set(), torch.get_num_threads()
        )
    return re.sub(r"[^a-z0-9]+", "-", find_device_name(device).lower())


def name_cpu_folder(name: str, instructions: str, threads: int) -> str:
    """Makes ``cpu/<name>-<instruction set>/<N>-threads``, in small letters and hyphens."""
    plain = re.sub(r"\((r|tm)\)", "", f"{name} {instructions}".lower())
    cpu = re.sub(r"[^a-z0-9_]+", "-", plain).strip("-")
    return f"cpu/{cpu}/{threads}-thread{'s' if threads > 1 else ''}"


def find_version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def find_commit() -> str:
    """Finds the checkout's commit, with a digest of the sources where they have changed since.

    Outside a repository returns the digest alone.
    """
    try:
        if not (ROOT / ".git").exists():
            return f"files {_digest_sources()}"
        changed = _git("status", "--porcelain", "--", *_MEASURED, *_WRITTEN)
        return _git("rev-parse", "HEAD").strip() + (
            f"+changes {_digest_sources()}" if changed else ""
        )
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown: {error}"


def digest_tuning() -> str:
    """Digests the verified and tuned rows, which decide what runs on a GPU."""
    files = sorted((ROOT / "kernels" / "tuning").glob("*.json"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


def _digest_sources() -> str:
    """Digests the sources, without what a check or a tuning on this machine writes."""
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
