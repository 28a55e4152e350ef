"""``fastlora info``: versions, devices, backends and verified kernels, and why something is not."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
from collections.abc import Callable

import torch

import fastlora
from fastlora.backends import native
from fastlora.backends.cpu import choices
from fastlora.commands.check import run as checking
from fastlora.commands.check.judging import DTYPES
from fastlora.commands.check.stamps import cache_folder
from fastlora.ops import availability, dispatch
from fastlora.ops.table import OPS

_PACKAGES = ("torch", "triton", "numpy", "safetensors", "peft", "transformers")


def describe_machine() -> str:
    """Says what fastlora can and cannot use on this machine, and why, a line each."""
    gpus = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    lines = [
        f"fastlora {fastlora.__version__} at {os.path.dirname(fastlora.__file__)}",
        f"python   {platform.python_version()} on {platform.system()} {platform.machine()}",
        *(f"{name:<8} {_find_version(name)}" for name in _PACKAGES),
        "",
        "devices",
        f"  cpu    {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
        *map(_describe_gpu, gpus),
    ]
    if not torch.cuda.is_available():
        lines.append(f"  cuda   not usable: {availability.no_gpu()}")
    lines += ["", "backends", *map(_describe_backend, availability.BACKENDS)]
    forced = os.environ.get("FASTLORA_BACKEND")
    lines += [f"  FASTLORA_BACKEND={forced}"] if forced else []
    lines += ["", "kernels", f"  cpu    runs lora_linear on {_choose_backend('lora_linear')}"]
    lines += _describe_choices()
    for index in gpus:
        lines += _describe_kernels(torch.device("cuda", index))
    lines.append(f"  rows of this machine's checks and timings: {cache_folder()}")
    lines += ["", "ops on CPU tensors"]
    lines += [f"  {name:<28} {_choose_backend(name)}" for name in OPS]
    return "\n".join(lines)


def _find_version(package: str) -> str:
    if importlib.util.find_spec(package) is None:
        return "not installed"
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"


def _describe_gpu(index: int) -> str:
    major, minor = torch.cuda.get_device_capability(index)
    return f"  cuda:{index} {torch.cuda.get_device_name(index)}, compute {major}.{minor}"


def _describe_backend(name: str) -> str:
    reason = availability.unusable(name)
    if reason is not None:
        return f"  {name:<6} not usable: {reason}"
    isa = f", with {native.instruction_set()} of {native.available()}" if name == "cpu" else ""
    return f"  {name:<6} usable{isa}"


def _describe_choices() -> list[str]:
    """Says up to how many rows the CPU's one native call is taken, and who measured that."""
    if availability.unusable("cpu") is not None:
        return []
    threads, isa = torch.get_num_threads(), native.instruction_set()
    lines = []
    for op in ("lora_linear", "multi_lora_linear"):
        parts = []
        for dtype, name in choices.DTYPES.items():
            measured = choices.find_row(op, name, isa, threads)
            beside = "" if measured else " (a default: `fastlora tune` measures)"
            parts.append(f"{name} {choices.choose(op, dtype).rows}{beside}")
        lines.append(f"         rows in one call of {op}: {', '.join(parts)}")
    return lines


def _describe_kernels(device: torch.device) -> list[str]:
    """Says which backend a GPU's layers run on, and what was verified there."""
    dtypes_of: dict[str, list[str]] = {}
    for name, (dtype, lora_dtype) in DTYPES.items():
        if name != "tf32":  # that is how fp32 is multiplied, by torch's setting
            backend = _choose_backend("lora_linear", device, dtype, lora_dtype)
            dtypes_of.setdefault(backend, []).append(name)
    backends = [f"{backend} ({', '.join(names)})" for backend, names in dtypes_of.items()]
    lines = [f"  {device} runs lora_linear on {', '.join(backends)}"]
    major, minor = torch.cuda.get_device_capability(device)
    usable = [name for name in ("triton", "cuda") if availability.cannot(name, device) is None]
    if not usable:
        return lines
    lookups = [_import_verified(backend) for backend in usable]

    def verified(op: str, dtype: str) -> tuple[str, ...]:
        return tuple(path for look_up in lookups for path in look_up(op, dtype, arch))

    arch = 10 * major + minor
    paths = list_verified(verified)
    paths = paths or ["nothing is verified here, so plain torch runs; `fastlora check` verifies"]
    return lines + [f"         {line}" for line in paths]


def _import_verified(backend: str) -> Callable[[str, str, int], tuple[str, ...]]:
    """Returns the backend's function that looks up verified paths by op, dtype and compute."""
    if backend == "triton":
        from fastlora.commands.kernels import choice

        return choice.verified
    from fastlora.backends.cuda import paths

    return paths.verified


def list_verified(verified: Callable[[str, str], tuple[str, ...]]) -> list[str]:
    """Lists each op's verified paths in a line, with the dtypes that share them."""
    lines = []
    for op in checking.CHECKED:
        dtypes: dict[tuple[str, ...], list[str]] = {}
        for dtype in DTYPES:
            dtypes.setdefault(verified(op, dtype), []).append(dtype)
        shared = [
            f"{', '.join(paths)} ({', '.join(names)})" for paths, names in dtypes.items() if paths
        ]
        lines += [f"verified {op}: {'; '.join(shared)}"] if shared else []
    return lines


def _choose_backend(
    op: str,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    lora_dtype: torch.dtype | None = None,
) -> str:
    try:
        with dispatch.quietly():
            return dispatch.choose(op, device or torch.device("cpu"), dtype, lora_dtype)
    except (RuntimeError, ValueError) as error:
        return f"cannot run: {error}"
