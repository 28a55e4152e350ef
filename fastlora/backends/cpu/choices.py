"""How many rows run in one native call: found by timing, for the CPU and the threads at hand.

A row of measurements (op, dtype, isa, cpu, threads) says up to how many rows of x the native call
was no slower than the base product with the adapter's part added, and whose base product is the
faster one beyond. ``fastlora tune`` writes rows into the user's cache, ``cpu.json``; those that
ship lie in ``kernels/tuning/cpu.json``. A process keeps what it has read first.
"""

from __future__ import annotations

import importlib
import platform
import re
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastlora.backends import native

FILE = "cpu.json"
KEYS = ("op", "dtype", "isa", "cpu", "threads")
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


class Choice(NamedTuple):
    """``rows``: up to so many in one native call; ``native``: the base product of more too."""

    rows: int
    native: bool = False


# Where nobody has measured: no slower than torch's own forms on the CPUs that were, an AMD with
# Zen 4 and an Intel with AMX (docs/kernels.md). ``vdpbf16ps`` runs at twice the rate of float32
# there, at half of it here; without it bfloat16 is widened by hand.
_F32, _BF16, _F16 = DTYPES.values()
DEFAULTS = {
    "amx_bf16": {_F32: 16, _BF16: 128, _F16: 8},
    "avx512_bf16": {_F32: 16, _BF16: 4, _F16: 8},
    "avx512": {_F32: 16, _BF16: 1, _F16: 8},
    "avx2": {_F32: 4, _BF16: 1, _F16: 4},
    "portable": {_F32: 1, _BF16: 0, _F16: 0},
    # For tests: all that the tiles have.
    "amx_emulated": {_F32: 16, _BF16: 512, _F16: 8},
}

# In place of what was measured, while ``fastlora tune`` or a benchmark measures.
forced: Choice | None = None


def choose(op: str, dtype: torch.dtype) -> Choice:
    """What ``lora_linear`` or ``multi_lora_linear`` does with rows of this dtype."""
    if forced is not None:
        return forced
    return _look_up(op, DTYPES[dtype], native.instruction_set(), torch.get_num_threads())


@cache
def _look_up(op: str, dtype: str, isa: str, threads: int) -> Choice:
    found = find_row(op, dtype, isa, threads)
    if found is None:
        return Choice(DEFAULTS[isa][dtype])
    return Choice(int(found["rows"]), bool(found["native"]))


def find_row(op: str, dtype: str, isa: str, threads: int) -> dict[str, Any] | None:
    """The row that was measured here, or on such a CPU with the nearest number of threads."""
    records = importlib.import_module("fastlora.kernels.choose.records")
    key = {"op": op, "dtype": dtype, "isa": isa, "cpu": cpu_name()}
    rows = [r for r in records.read(FILE, versions()) if key.items() <= r.items() and _whole(r)]
    # The first of those as near: the user's own.
    return min(rows, key=lambda row: abs(row["threads"] - threads), default=None)


def _whole(row: dict[str, Any]) -> bool:
    """Whether a row, which a user may have written, can be read."""
    return isinstance(row.get("rows"), int) and isinstance(row.get("threads"), int)


def versions() -> dict[str, Any]:
    """What the user's own rows hold for: these kernels."""
    return {"abi": native.ABI_VERSION}


def forget() -> None:
    """Reads the files anew at the next call."""
    _look_up.cache_clear()


@cache
def cpu_name() -> str:
    """The CPU's name as the system has it."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return match[1].strip() if match else platform.processor() or platform.machine()
