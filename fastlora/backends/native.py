"""The compiled C functions: one table, bound with ctypes.

``csrc/fastlora.h`` declares them. They are in two libraries, which lie in fastlora/ when the
build found a compiler; without them everything works, on the other backends. ``FASTLORA_CPU_ISA``
names the instruction set to use in place of the best one (``none``: no native CPU library at all);
``FASTLORA_CPU_LIBRARY`` and ``FASTLORA_CUDA_LIBRARY`` name other files to load.
"""

from __future__ import annotations

import ctypes
import os
import sys
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import torch

ABI_VERSION = 6
OK, BAD_ARGUMENT, NO_MEMORY, NOT_FINITE, NOT_MERGED, NOT_RESTORED, LAUNCH_FAILED = range(7)
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

_SUFFIX = ".dylib" if sys.platform == "darwin" else ".so"
ASKED = os.environ.get("FASTLORA_CPU_ISA")


def _file(library: str) -> Path:
    asked = os.environ.get(f"FASTLORA_{library.upper()}_LIBRARY")
    return Path(asked or Path(__file__).parents[1] / f"libfastlora_{library}{_SUFFIX}")


PATH, CUDA_PATH = _file("cpu"), _file("cuda")

_p, _l, _i, _f, _s = (
    ctypes.c_void_p,
    ctypes.c_int64,
    ctypes.c_int32,
    ctypes.c_float,
    ctypes.c_char_p,
)
_MATRIX = [_p, _l]
_MERGED = [_p, _l, _l, _p, _p, _l, _l, _l, _i, _i]

# Result, then arguments, as csrc/fastlora.h has them; a test compares.
# fmt: off
FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "fastlora_abi_version": (_i, []),
    "fastlora_cpu_available": (_s, []),
    "fastlora_cpu_missing": (_s, [_s]),
    "fastlora_cpu_current": (_s, []),
    "fastlora_cpu_use": (_i, [_s]),
    "fastlora_lora_linear": (
        _i,
        # y, h, x, weight, bias, lora_A, lora_B, lora_bias, M K N R, scaling, dtypes, threads
        [*_MATRIX * 4, _p, *[_p, _l, _l] * 2, _p, *[_l] * 4, _f, _i, _i, _i],
    ),
    "fastlora_multi_lora_linear": (
        _i,
        # y, h, x, weight, bias, lora_A, lora_B, order, starts, scalings, ranks, row_scales,
        # M K N R S, table, pages, page, dtypes, threads
        [*_MATRIX * 4, _p, *[_p, _l, _l] * 2, *[_p] * 5, *[_l] * 5, *_MATRIX, _l, _l, _i, _i, _i],
    ),
    # y, x, slices, order, starts, scalings, row_scales, M K R S, dtypes, threads
    "fastlora_multi_lora_add": (
        _i, [*_MATRIX * 2, _p, _l, *[_p] * 4, *[_l] * 4, _i, _i, _i],
    ),
    # out, left, right, M R C, scaling, dtypes, threads
    "fastlora_gradient": (_i, [_p, _l, _l, *_MATRIX * 2, *[_l] * 3, _f, _i, _i, _i]),
    # out, x, M K, first row, seed, threshold, scale, add, dtype, threads
    "fastlora_dropout": (_i, [*_MATRIX * 2, *[_l] * 4, _i, _f, _i, _i, _i]),
    "fastlora_merge": (_i, [*_MERGED, _p]),
    "fastlora_receipt_size": (_l, [_p]),
    "fastlora_receipt_read": (_i, [_p, _p, _p, _p, _p]),
    "fastlora_receipt_undo": (_i, [*_MERGED, _p]),
    "fastlora_receipt_free": (None, [_p]),
    "fastlora_unmerge": (_i, [*_MERGED, _p, _p, _p, _l, _p]),
    "fastlora_cuda_abi_version": (_i, []),
    "fastlora_cuda_architectures": (_s, []),
    "fastlora_cuda_compiler": (_s, []),
    "fastlora_cuda_last_error": (_s, []),
    "fastlora_cuda_lora_linear": (
        _i,
        # y, h, scaled, x, weight, bias, lora_A, lora_B, lora_bias, M K N R, scaling, seed,
        # threshold, keep scale, drops x, transposed, path, overlap, dtypes, stream
        [
            *_MATRIX, _p, _p, *_MATRIX * 2, _p, *_MATRIX * 2, _p, *[_l] * 4, _f, _p, _i, _f,
            *[_i] * 6, _p,
        ],
    ),
    "fastlora_cuda_multi_lora_decode": (
        _i,
        # y, h, x, weight, bias, lora_A, lora_B, ids, scalings, ranks, row_scales, table, pages,
        # page, ends, slices, M K N R S, overlap, dtypes, stream
        [
            *_MATRIX, _p, *_MATRIX * 2, _p, *[_p, _l, _l, _l] * 2, *[_p] * 4, _p, _l, _l, _l,
            _p, _l, *[_l] * 5, *[_i] * 3, _p,
        ],
    ),
    # tables, states, the old receipt's, sums, counts, offsets, cursor, pool, tiles, capacity,
    # wanted, dtypes, how, stream
    "fastlora_cuda_swap": (_i, [*[_p] * 13, _l, _l, *[_i] * 5, _p]),
    # positions, bits, pool, starts, offsets, counts, tiles, dtype, stream
    "fastlora_cuda_gather": (_i, [*[_p] * 6, _l, _i, _p]),
}
# fmt: on


@cache  # calls ask for it, hundreds a token
def load(path: Path = PATH) -> ctypes.CDLL | str:
    """The library, bound, or the reason why there is none."""
    if ASKED == "none":
        return "FASTLORA_CPU_ISA=none switches the native library off"
    if not path.exists():
        return "the native library was not built (no C++ compiler, or FASTLORA_BUILD said so)"
    library = _open(path, "fastlora_abi_version")
    if isinstance(library, str):
        return library
    if ASKED and library.fastlora_cpu_use(ASKED.encode()) != OK:
        usable = library.fastlora_cpu_available().decode().replace(",", ", ")
        reason = f"FASTLORA_CPU_ISA: expected none or one of {usable}, got {ASKED!r}"
        missing = library.fastlora_cpu_missing(ASKED.encode())
        if missing:
            reason += f" ({missing.decode()})"
        warnings.warn(f"{reason}; the native library stays unused", RuntimeWarning, stacklevel=2)
        return reason
    return library


@cache
def load_cuda(path: Path = CUDA_PATH) -> ctypes.CDLL | str:
    """The CUDA library, bound, or the reason why there is none."""
    if not path.exists():
        return "the CUDA library was not built (no nvcc, or FASTLORA_BUILD said so)"
    return _open(path, "fastlora_cuda_abi_version")


def _open(path: Path, version_of: str) -> ctypes.CDLL | str:
    try:
        library = ctypes.CDLL(str(path))
        version = getattr(library, version_of)()
        if version != ABI_VERSION:
            return (
                f"{path.name} was built for ABI version {version}, this version of fastlora needs "
                f"{ABI_VERSION}: build it again"
            )
        cuda = "_cuda_" in version_of
        for name, (result, arguments) in FUNCTIONS.items():
            if name.startswith("fastlora_cuda_") == cuda:
                function = getattr(library, name)
                function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        return f"{path.name} cannot be loaded: {error}"
    return library


def cuda_functions() -> ctypes.CDLL:
    """The CUDA library's functions; RuntimeError with the reason where there are none."""
    library = load_cuda()
    if isinstance(library, str):
        raise RuntimeError(library)
    return library


@cache
def cuda_on_host() -> bool:
    """Whether the CUDA library's kernels run on the host, on CPU tensors."""
    return cuda_functions().fastlora_cuda_architectures() == b"host"


def unusable() -> str | None:
    """Why there is no native CPU library, or None when there is one."""
    library = load()
    return library if isinstance(library, str) else None


def functions() -> ctypes.CDLL:
    """The library with its functions bound; RuntimeError with the reason where there is none."""
    library = load()
    if isinstance(library, str):
        raise RuntimeError(library)
    return library


@cache
def instruction_set() -> str:
    """The instruction set that the CPU kernels use."""
    return functions().fastlora_cpu_current().decode()


def use(name: str) -> None:
    """Makes the CPU kernels use another instruction set of those ``available``."""
    if functions().fastlora_cpu_use(name.encode()) != OK:
        raise ValueError(f"name: expected one of {available()}, got {name!r}")
    instruction_set.cache_clear()


def available() -> str:
    """Those that the library has and this machine runs, best first."""
    return functions().fastlora_cpu_available().decode().replace(",", ", ")


def check(code: int, what: str) -> None:
    """Raises for the codes that are this library's own mistakes or the machine's limits."""
    if code == NO_MEMORY:
        raise MemoryError(f"{what}: out of memory")
    if code == LAUNCH_FAILED:
        reason = cuda_functions().fastlora_cuda_last_error().decode()
        raise RuntimeError(f"{what}: a CUDA kernel could not be launched: {reason}")
    if code != OK:
        raise RuntimeError(f"{what}: the native library refused its arguments (code {code})")
