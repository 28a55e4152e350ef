"""The compiled C functions: one table, bound with ctypes.

``csrc/fastlora.h`` declares them. The library lies beside this file when the build found a
compiler; without it everything works, on the other backends. ``FASTLORA_CPU_ISA`` names the
instruction set to use in place of the best one (``none``: no native library at all), and
``FASTLORA_CPU_LIBRARY`` another file to load.
"""

from __future__ import annotations

import ctypes
import os
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch

ABI_VERSION = 2
OK, BAD_ARGUMENT, NO_MEMORY, NOT_FINITE, NOT_MERGED, NOT_RESTORED = range(6)
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

_SUFFIX = ".dylib" if sys.platform == "darwin" else ".so"
ASKED = os.environ.get("FASTLORA_CPU_ISA")
PATH = Path(
    os.environ.get("FASTLORA_CPU_LIBRARY") or Path(__file__).with_name(f"libfastlora_cpu{_SUFFIX}")
)

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
FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "fastlora_abi_version": (_i, []),
    "fastlora_cpu_available": (_s, []),
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
        # M K N R S, dtypes, threads
        [*_MATRIX * 4, _p, *[_p, _l, _l] * 2, *[_p] * 5, *[_l] * 5, _i, _i, _i],
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
}


@cache  # calls ask for it, hundreds a token
def load(path: Path = PATH) -> ctypes.CDLL | str:
    """The library, bound, or the reason why there is none."""
    if ASKED == "none":
        return "FASTLORA_CPU_ISA=none switches the native library off"
    if not path.exists():
        return "the native library was not built (no C++ compiler, or FASTLORA_BUILD said so)"
    try:
        library = ctypes.CDLL(str(path))
        version = library.fastlora_abi_version()
        if version != ABI_VERSION:
            return (
                f"{path.name} was built for ABI version {version}, this version of fastlora needs "
                f"{ABI_VERSION}: build it again"
            )
        for name, (result, arguments) in FUNCTIONS.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        return f"{path.name} cannot be loaded: {error}"
    if ASKED and library.fastlora_cpu_use(ASKED.encode()) != OK:
        usable = library.fastlora_cpu_available().decode().replace(",", ", ")
        return f"FASTLORA_CPU_ISA: expected none or one of {usable}, got {ASKED!r}"
    return library


def unusable() -> str | None:
    """Why there is no native CPU library, or None when there is one."""
    found = load()
    return found if isinstance(found, str) else None


def functions() -> ctypes.CDLL:
    """The library with its functions bound; RuntimeError with the reason where there is none."""
    found = load()
    if isinstance(found, str):
        raise RuntimeError(found)
    return found


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
    if code != OK:
        raise RuntimeError(f"{what}: the native library refused its arguments (code {code})")
