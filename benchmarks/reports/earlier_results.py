"""Earlier results of this device, to compare a run with."""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks.cases import SUITES
from benchmarks.harness import lines, machine
from benchmarks.harness.lines import Line


def find(path: Path, device: str) -> tuple[list[Line], str]:
    """Finds the lines, or none of them and the reason.

    path: a file of results, a folder of them, or one of several devices' folders, such as
    ``benchmarks/results``, in which this device's is taken. Raises FileNotFoundError where there
    are no results at all, ValueError as ``lines.read``.
    """
    if not path.is_dir() or any(path.glob("*.jsonl")):
        return lines.read_all(path), ""
    folders = {file.parent for suite in SUITES for file in path.rglob(f"{suite}.jsonl")}
    if not folders:
        raise FileNotFoundError(f"expected results such as linear.jsonl, found none in {path}")
    mine = machine.name_folder(device)
    if path / mine in folders:
        return lines.read_all(path / mine), ""
    named = (folder.relative_to(path) for folder in folders)
    alike = sorted(str(name) for name in named if len(name.parts) == len(Path(mine).parts))
    have = ", ".join(alike) or "none of this kind"
    return [], f"no evidence of {_describe_device(device)}: nothing to compare with; have: {have}"


def _describe_device(device: str) -> str:
    name, threads = machine.find_device_name(device), torch.get_num_threads()
    if device == "cuda":
        return f"this GPU ({name})"
    threads = f"{threads} thread{'s' if threads > 1 else ''}"
    return f"this CPU ({name}, {machine.find_instruction_set()}), {threads}"
