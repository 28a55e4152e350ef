"""Every kernel compiles for every target without a GPU, and what checks the code can find fault."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]


def run_python(*arguments: object, interpret: bool = False) -> subprocess.CompletedProcess:
    """Runs python as a user would: the test-suite's own interpreter is not what is tested."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    if interpret:
        env["TRITON_INTERPRET"] = "1"
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)


def run_script(tmp_path: Path, source: str) -> str:
    """Output of a file, which is where triton can find a kernel's source."""
    path = tmp_path / "script.py"
    path.write_text(textwrap.dedent(source))
    done = run_python(path)
    assert done.returncode == 0, done.stderr
    return done.stdout


EVERY = (80, 90, 100)


@pytest.mark.parametrize(
    "archs",
    [
        {"gather": EVERY, "keep_mask": EVERY},
        # Products take long; the tests below compile some of them too.
        pytest.param({"shrink": EVERY, "gemm_tma": (90, 100)}, marks=pytest.mark.full),
    ],
    ids="+".join,
)
def test_aot_sample_compiles_for_every_target(archs) -> None:
    """CI compiles every kernel's with two tritons; here a few show that it works."""
    few = [word for name in archs for word in ("--kernel", name)]
    done = run_python("-m", "fastlora.kernels.aot", "--sample", *few)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {tuple(line.split()[:4:3]) for line in done.stdout.splitlines()}
    assert {(name, f"sm_{arch}") for name in archs for arch in archs[name]} <= rows


@pytest.mark.full  # a fault that shows is quick
def test_aot_check_fails_for_tile_too_large(tmp_path) -> None:
    said = run_script(
        tmp_path,
        """
        from fastlora.kernels.aot import run as aot, cases as aot_cases
        from fastlora.kernels.tile.configs import Gemm

        case = aot_cases.Case("gemm", "bf16", Gemm(128, 256, 64, 8, 4, 6), 90, aot_cases.Variant())
        print(aot.compile_case(case)[0].faults)
        """,
    )
    assert "spills: " in said
    assert "bytes of shared memory, sm_90 has 232448" in said


def test_aot_fault_gives_line_and_exit_code(tmp_path) -> None:
    said = run_script(
        tmp_path,
        """
        from fastlora.kernels.aot import run as aot, cases as aot_cases, checks as aot_checks

        aot_checks.fitting.SHARED[90] = 1024
        print(aot.main(["--kernel", "keep_mask", "--arch", "90", "--jobs", "1"]))
        """,
    ).splitlines()
    assert said[0].startswith("FAILED keep_mask fp32 - sm_90 R16: ")
    assert said[-1] == "1"


@pytest.mark.full  # a fault that shows is quick
def test_aot_check_fails_for_missing_instruction(tmp_path) -> None:
    said = run_script(
        tmp_path,
        """
        from fastlora.kernels.aot import run as aot, cases as aot_cases
        from fastlora.kernels.tile.configs import Gemm

        aot.needed_instructions = lambda case: ("tcgen05.mma",)
        case = aot_cases.Case("gemm", "bf16", Gemm(64, 64, 64, 8, 4, 4), 90, aot_cases.Variant())
        print(*aot.compile_case(case)[0].faults)
        """,
    )
    assert said.strip() == "no tcgen05.mma in its PTX"


NARROW = (
    "rows[:, None] * s_x_m + columns[None, :]",
    "(rows[:, None] * s_x_m).to(tl.int64) + columns[None, :]",
    "rows[:, None] * N + columns[None, :]",
    "tl.program_id(1) * s_x_m + rows[:, None] * 0 + columns[None, :]",
    "rows.to(tl.int64)[:, None] * (16 * s_x_m) + columns[None, :]",
)
WIDE = "rows.to(tl.int64)[:, None] * s_x_m + columns[None, :]"

COPY = """
@triton.jit
def copy{number}(p_x, p_y, N, s_x_m, BM: tl.constexpr):
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    columns = tl.arange(0, BM)
    b_x = tl.load(p_x + {offsets})
    tl.store(p_y + rows[:, None].to(tl.int64) * N + columns[None, :], b_x)

with aot.compiling(90) as compiled:
    copy{number}[(1,)](torch.empty(1), torch.empty(1), 1000, 1000, BM=16)
print(narrow_offsets(compiled[0].asm["ttir"]))
"""


@pytest.mark.full  # a fault that shows is quick
def test_aot_check_fails_for_narrow_offsets(tmp_path) -> None:
    imports = """
import torch
import triton
import triton.language as tl

from fastlora.kernels.aot import run as aot, cases as aot_cases
from fastlora.kernels.aot.checks import narrow_offsets
"""
    copies = [COPY.format(number=i, offsets=text) for i, text in enumerate((*NARROW, WIDE))]
    *narrow, wide = run_script(tmp_path, imports + "".join(copies)).splitlines()
    for offsets, said in zip(NARROW, narrow, strict=True):
        assert "a 32-bit offset: " in said, offsets
    assert wide == "[]"


def test_aot_refuses_interpreted_kernels() -> None:
    done = run_python("-m", "fastlora.kernels.aot", "--sample", interpret=True)
    assert done.returncode == 2
    assert "TRITON_INTERPRET: expected unset" in done.stderr
