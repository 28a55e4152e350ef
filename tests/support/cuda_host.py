"""Compiles CUDA sources for the host, where they run without a GPU: csrc/cuda/host says how."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # not on Windows, which has no fibers of this kind either
    fcntl = None

ROOT = Path(__file__).resolve().parents[2]
CUDA = ROOT / "csrc" / "cuda"
# -ffp-contract=off: as nvcc's -fmad=false. Fortified, longjmp refuses to change stacks.
FLAGS = ["-std=c++17", "-O2", "-march=native", "-ffp-contract=off", "-U_FORTIFY_SOURCE"]
FLAGS += ["-DFL_HOST", "-fPIC", "-Wall", "-Wno-unknown-pragmas"]
# A sanitizer's, say.
FLAGS += shlex.split(os.environ.get("FASTLORA_CUDA_HOST_FLAGS", ""))
# Which takes ten times as long.
SANITIZED = any("sanitize" in flag for flag in FLAGS)
# Seeds of the orders of threads that a kernel is tried in.
ORDERS = range(1, 2 if SANITIZED else 5)


def built() -> Path | None:
    """The whole library for the host; None without a compiler, or elsewhere than on Linux."""
    return compiled("libfastlora_cuda.so", sorted(CUDA.rglob("*.cu")))


def compiled(name: str, sources: Sequence[Path]) -> Path | None:
    """These sources and the fibers as a library, kept for the next run of the same sources."""
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if compiler is None or fcntl is None or os.uname().sysname != "Linux":
        return None
    sources = [*sources, CUDA / "machine" / "host" / "fibers.cpp"]
    headers = [*CUDA.glob("**/*.h"), ROOT / "csrc" / "fastlora.h"]
    parts = [p.read_bytes() for p in sorted({*sources, *headers})]
    parts += [" ".join([compiler, *FLAGS]).encode()]
    key = hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
    folder = ROOT / "build" / "cuda-host" / key
    with _alone(folder):
        if not (folder / name).exists():
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                objects = list(pool.map(lambda s: _object(compiler, s, folder), sources))
            new = folder / f"{name}.new"
            subprocess.run([compiler, *FLAGS, "-shared", *objects, "-o", new], check=True)
            new.rename(folder / name)
    return folder / name


def _object(compiler: str, source: Path, folder: Path) -> Path:
    out = folder / f"{source.stem}.o"
    include = ["-I", str(ROOT / "csrc")]
    command = [compiler, *FLAGS, *include, "-x", "c++", "-c", str(source), "-o", str(out)]
    subprocess.run(command, check=True)
    return out


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Of several processes that want a library, one makes it."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def order(loaded: ctypes.CDLL, seed: int) -> Iterator[None]:
    """Blocks and threads take turns in an order drawn from seed; 0: in their own."""
    loaded.fastlora_cuda_host_order(ctypes.c_uint64(seed))
    try:
        yield
    finally:
        loaded.fastlora_cuda_host_order(ctypes.c_uint64(0))


if __name__ == "__main__":
    print(built())
