"""The machine code that nvcc made of csrc/cuda: no spills, and the instructions meant."""

# Reads the library as it was built, with the cuobjdump of the CUDA toolkit or of triton.

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections import defaultdict
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
def cuobjdump_by_kernel(arch: str, what: str) -> dict[str, str]:
    """What cuobjdump says of each kernel of an architecture, by its readable name."""
    command = [str(TOOL), "-arch", f"sm_{arch}", what, str(LIBRARY)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    parts = re.split(r"^\s*Function :? ?(\S+?):?$", said, flags=re.MULTILINE)[1:]
    names = subprocess.run(
        ["c++filt"], input="\n".join(parts[::2]), capture_output=True, text=True, check=True
    ).stdout.splitlines()
    return dict(zip(names, parts[1::2], strict=True))


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


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_kernels_use_dependent_launches_from_hopper_on(arch):
    for kernel, sass in cuobjdump_by_kernel(arch, "-sass").items():
        if body_name(kernel) in ("gemm", "decode"):
            assert ("ACQBULK" in sass) == (arch != "80"), kernel
        if body_name(kernel) in ("shrink", "row_shrink"):
            assert ("PREEXIT" in sass) == (arch != "80"), kernel
