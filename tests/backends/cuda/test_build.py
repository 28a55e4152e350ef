"""The machine code that nvcc made of csrc/cuda: no spills, and the instructions meant."""

# Reads the library as it was built, with the cuobjdump of the CUDA toolkit or of triton.

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import pytest

from fastlora.backends import native

LIBRARY = Path(native.__file__).parents[1] / f"libfastlora_cuda{native.CUDA_PATH.suffix or '.so'}"
ARCHITECTURES = ("80", "90", "100")
# Which of tensor cores, asynchronous copies and 16-byte loads a kernel has.
MEANT = {
    "gemm": (True, True, False),
    "shrink": (True, True, False),
    "one_pass": (True, True, False),
    "row_shrink": (False, False, True),
    "decode": (True, True, True),
    "swap_tiles": (True, False, True),
    "gather": (False, False, False),
}
# Which waits for the launch before it, and which lets the next one begin.
LAUNCHES = {"gemm": "ACQBULK", "decode": "ACQBULK", "shrink": "PREEXIT", "row_shrink": "PREEXIT"}


def cuobjdump() -> str | None:
    found = shutil.which("cuobjdump")
    spec = importlib.util.find_spec("triton")
    if found is None and spec is not None and spec.submodule_search_locations:
        own = Path(spec.submodule_search_locations[0]) / "backends/nvidia/bin/cuobjdump"
        found = str(own) if own.exists() else None
    return found


TOOL = cuobjdump()
if not LIBRARY.exists() or TOOL is None:
    why = "no CUDA library was built" if TOOL else "no cuobjdump, of CUDA or of triton"
    pytest.skip(why, allow_module_level=True)


@cache
def cuobjdump_by_symbol(arch: str, *what: str) -> dict[str, str]:
    command = [str(TOOL), "-arch", f"sm_{arch}", *what, str(LIBRARY)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    parts = re.split(r"^\s*Function :? ?(\S+?):?$", said, flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def readable_names(symbols: Iterable[str]) -> list[str]:
    command = subprocess.run(
        ["c++filt"], input="\n".join(symbols), capture_output=True, text=True, check=True
    )
    return command.stdout.splitlines()


@cache
def cuobjdump_by_kernel(arch: str, *what: str) -> dict[str, str]:
    """What cuobjdump says of each kernel of an architecture, by its readable name."""
    found = cuobjdump_by_symbol(arch, *what)
    return dict(zip(readable_names(found), found.values(), strict=True))


def body_name(kernel: str) -> str:
    found = re.search(r"fastlora::(\w+)<", kernel)
    assert found is not None, kernel
    return found[1]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_kernels_spill_nothing_on_any_architecture(arch):
    resources = cuobjdump_by_kernel(arch, "-res-usage")
    assert {body_name(kernel) for kernel in resources} == set(MEANT)
    for kernel, said in resources.items():
        assert re.search(r"STACK:0 .*LOCAL:0 ", said), f"{kernel}: {said}"


@pytest.mark.parametrize(
    "arch", [pytest.param(a, marks=[] if a == "90" else pytest.mark.full) for a in ARCHITECTURES]
)
def test_kernels_use_instructions_meant_for_architecture(arch):
    instances = defaultdict(int)
    for kernel, sass in cuobjdump_by_kernel(arch, "-sass").items():
        cores, copies, wide = MEANT[body_name(kernel)]
        # Without a base product; element by element.
        cores = cores and not re.search(r"DecodeTile<.*, \d+, false>", kernel)
        wide = wide and not re.search(r"swap_tiles<.*, false>", kernel)
        assert ("HMMA" in sass) == cores, kernel
        assert ("LDGSTS" in sass) == copies, kernel
        if copies:
            # Past L1, which goes with 16 bytes alone.
            assert re.search(r"LDGSTS\.E\.BYPASS[.\w]*\.128", sass), kernel
        if wide:
            assert re.search(r"LDG\.E\.128", sass), kernel
        instances[body_name(kernel)] += 1
    assert set(instances) == set(MEANT)


# All kernels of the other architectures are read for their instructions, which is full.
@pytest.mark.parametrize(
    "arch, every",
    [("80", False), ("90", True), ("100", False)]
    + [pytest.param(arch, True, marks=pytest.mark.full) for arch in ("80", "100")],
)
def test_kernels_use_dependent_launches_from_hopper_on(arch, every):
    what = ["-sass"]
    if not every:
        symbols = cuobjdump_by_symbol(arch, "-res-usage")
        of_body = {body_name(n): s for n, s in zip(readable_names(symbols), symbols, strict=True)}
        what += ["-fun", ",".join(of_body[body] for body in LAUNCHES)]
    found = cuobjdump_by_kernel(arch, *what)
    assert set(LAUNCHES) <= {body_name(kernel) for kernel in found}
    for kernel, sass in found.items():
        if body_name(kernel) in LAUNCHES:
            assert (LAUNCHES[body_name(kernel)] in sass) == (arch != "80"), kernel
