"""Which path and which tile shapes run a product: tuned, verified, or by the ledger.

The path: the one that ``kernels/tuning`` says was fastest for the nearest shape, else the cheapest
by ``ledger``, among those that can run it and, where any path is verified on this GPU, are. The
config: the nearest tuned one of that kernel, else ``configs.default``.
"""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import torch
import triton

from fastlora.kernels.choose import ledger, records
from fastlora.kernels.choose.ledger import MULTI_PATHS, PATHS, Problem
from fastlora.kernels.tile import configs, fitting
from fastlora.kernels.tile.launch import arch_of, interpreted
from fastlora.kernels.tile.numerics import precision

PRODUCT_PATHS = tuple(dict.fromkeys(PATHS + MULTI_PATHS))
# What rows may name: merging has a path of its own.
EVERY_PATH = (*PRODUCT_PATHS, "in_place")
DTYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
MOST_RANKS = 512
# The kernels, and the host code that launches them.
_HOST = Path(sys.modules["fastlora"].__file__).parent / "backends"
_SOURCES = (Path(__file__).parents[1], _HOST / "triton", _HOST / "merge_lists")
# Beyond a factor of 4 in all dimensions together (log2), a tuned shape says nothing about another.
_FAR = 2.0


def dtype_name(dtype: torch.dtype, lora_dtype: torch.dtype) -> str:
    """Names it as rows do: bf16, or bf16+fp32 with float32 adapters; fp32 as it enters products."""
    name = DTYPES[dtype]
    if dtype == torch.float32 and precision(dtype) == "tf32":
        name = "tf32"
    return name if lora_dtype == dtype else f"{name}+{DTYPES[lora_dtype]}"


@lru_cache
def versions() -> dict[str, str]:
    """What the user's own rows hold for: this triton, and the kernels as they are."""
    files = [file for folder in _SOURCES for file in sorted(folder.rglob("*.py"))]
    source = hashlib.sha256(b"".join(file.read_bytes() for file in files))
    return {"triton": triton.__version__, "kernels": source.hexdigest()[:12]}


def gpu_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"


@lru_cache
def verified(op: str, dtype: str | None, arch: int) -> tuple[str, ...]:
    """The paths of op that passed their test on such a GPU, in this dtype or, if None, in any."""
    return records.verified(op, dtype, arch, EVERY_PATH, versions())


class NoSuchPath(RuntimeError):
    """A product was to run along a path that it cannot take."""


# What use_path asked for, for every thread: backward runs in one of autograd's.
_asked: str | None = None
_strictly = False


@contextmanager
def use_path(path: str, *, strictly: bool = False) -> Iterator[None]:
    """Runs products along ``path`` wherever it can run them: to measure a path, or to test it.

    strictly: a product that it cannot run raises NoSuchPath, where another path would else be
    taken.
    """
    if path not in PRODUCT_PATHS:
        raise ValueError(f"path: expected one of {', '.join(PRODUCT_PATHS)}, got {path!r}")
    global _asked, _strictly
    before, _asked, _strictly = (_asked, _strictly), path, strictly
    try:
        yield
    finally:
        _asked, _strictly = before


def path_of(
    op: str,
    problem: Problem,
    dtype: torch.dtype,
    lora_dtype: torch.dtype,
    first: bool,
    device: torch.device,
) -> str:
    """The path that runs a product; first: its rank step must come first."""
    if _asked is not None:
        if possible(_asked, problem, arch_of(device), first):
            return _asked
        if _strictly:
            raise NoSuchPath(f"{op} cannot run along {_asked!r}: {problem}")
    return _best(op, problem, dtype_name(dtype, lora_dtype), first, device)


@lru_cache(maxsize=4096)
def _best(op: str, problem: Problem, dtype: str, first: bool, device: torch.device) -> str:
    arch = arch_of(device)
    paths = PATHS if problem.slots is None else MULTI_PATHS
    can = tuple(path for path in paths if possible(path, problem, arch, first))
    known = tuple(path for path in can if path in verified(op, dtype, arch))
    allowed = known or can
    tuned = _nearest(f"path of {op}", dtype.split("+")[0], problem, device)
    if tuned is not None and tuned.get("path") in allowed:
        return tuned["path"]
    return ledger.best(problem, arch, allowed)


def possible(path: str, problem: Problem, arch: int, first: bool) -> bool:
    """Whether ``path`` can run the product on such a GPU at all."""
    if problem.slots is not None:
        return _possible_multi(path, problem, arch, first)
    if path not in PATHS:
        return False
    if path == "one_pass":
        return _most_ranks_in_one_pass(problem) >= problem.R
    if path == "overlapped":
        # Dependent launches exist from Hopper on, and not under the interpreter.
        # Without ranks nothing is launched that the product could wait for.
        there = problem.weight and problem.R > 0
        return arch >= 90 and not first and there and not interpreted()
    return problem.weight or path != "library"


def _possible_multi(path: str, problem: Problem, arch: int, first: bool) -> bool:
    if path not in MULTI_PATHS or problem.weight == (path == "added"):
        return False
    if path.endswith("_beside"):
        waits_at_once = first and path.startswith("prefill")
        # Without ranks nothing is launched that the product could wait for.
        return arch >= 90 and problem.R > 0 and not waits_at_once and not interpreted()
    return True


def config_of(
    kernel: str, problem: Problem, dtype: torch.dtype, device: torch.device
) -> configs.Config:
    """The tile shapes that ``kernel`` is launched with."""
    return _config(kernel, problem, dtype_name(dtype, dtype), device)


def _most_ranks_in_one_pass(p: Problem) -> int:
    """What one tile holds beside its sums without a spill: ``make aot`` found where it ends."""
    if p.size == 4 or (p.masked == "x" and p.M > 32):
        return 32
    return 64 if p.M > 64 else 128


@lru_cache(maxsize=4096)
def _config(kernel: str, problem: Problem, dtype: str, device: torch.device) -> configs.Config:
    tuned, arch = _nearest(kernel, dtype, problem, device), arch_of(device)
    if tuned is not None:
        config = type(configs.CANDIDATES[kernel][0])(**tuned["config"])
    else:
        config = configs.default(kernel, problem.M, problem.N, arch)
    return fitting.fitted(config, need(kernel, problem, dtype, arch))


def need(kernel: str, p: Problem, dtype: str, arch: int) -> fitting.Need:
    """What a product of ``dtype``, as rows name it, asks of a config."""
    precise = dtype.split("+")[0] == "fp32"
    # Beside a product whose tiles are wide, of which one fills an SM.
    slim = kernel == "shrink_beside" and configs.wide(p.M, p.N, arch)
    return fitting.Need(p.size, p.lora_size or p.size, p.R, p.masked, precise, arch, slim)


def forget() -> None:
    """Reads the files anew at the next call."""
    for cached in (verified, _best, _config, _tuned):
        cached.cache_clear()


@lru_cache
def _tuned(gpu: str) -> dict[tuple[str, str], list[records.Row]]:
    """The GPU's rows that can be understood, by kernel and dtype."""
    rows_by_kernel: dict[tuple[str, str], list[records.Row]] = {}
    for row in records.read(records.file_of(gpu), versions()):
        if _understood(row):
            rows_by_kernel.setdefault((row["kernel"], row["dtype"]), []).append(row)
    return rows_by_kernel


def _understood(row: records.Row) -> bool:
    """Whether a row is of this version's making: a file may be an older one's, or damaged."""
    shape = all(isinstance(row.get(letter), int) for letter in "MKNR")
    kernel, dtype = row.get("kernel"), row.get("dtype")
    if not (shape and isinstance(kernel, str) and isinstance(dtype, str)):
        return False
    if kernel.startswith("path of "):
        return row.get("path") in EVERY_PATH
    return row.get("config") in [vars(config) for config in configs.CANDIDATES.get(kernel, ())]


def _nearest(kernel: str, dtype: str, p: Problem, device: torch.device) -> records.Row | None:
    """The tuned row of the nearest shape, in log space, that is near at all."""

    def distance(row: records.Row) -> float:
        pairs = ((row["M"], p.M), (row["K"], p.K), (row["N"], p.N), (row["R"], p.R))
        return math.sqrt(sum(math.log2(max(a, 1) / max(b, 1)) ** 2 for a, b in pairs))

    rows = _tuned(gpu_name(device)).get((kernel, dtype), [])
    # A path that was timed with a base product says nothing of one without.
    rows = [row for row in rows if row.get("weight", p.weight) == p.weight]
    row = min(rows, key=distance, default=None)
    return row if row is not None and distance(row) <= _FAR else None
