"""An instruction set that this machine, or its system, does not let be used."""

import os

import pytest

from fastlora.backends import native
from tests.support import forks

if native.unusable() is not None:
    pytest.skip(str(native.unusable()), allow_module_level=True)

AMX = b"amx_bf16"
MISSING = native.functions().fastlora_cpu_missing(AMX)

# A filter of system calls under which the permission for AMX tiles is refused: of arch_prctl
# (158 on x86-64) the request 0x1023 fails with EPERM, all else goes on.
DENY = """
import ctypes, struct
LOAD, JUMP_IF_EQUAL, RETURN = 0x20, 0x15, 0x06
filters = b"".join(struct.pack("HBBI", *each) for each in [
    (LOAD, 0, 0, 0), (JUMP_IF_EQUAL, 0, 3, 158), (LOAD, 0, 0, 16), (JUMP_IF_EQUAL, 0, 1, 0x1023),
    (RETURN, 0, 0, 0x00050001), (RETURN, 0, 0, 0x7fff0000),
])

class Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filters", ctypes.c_char_p)]

system = ctypes.CDLL(None)
NO_NEW_PRIVILEGES, SECCOMP, FILTER = 38, 22, 2
program = Program(len(filters) // 8, filters)
if system.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0) or system.prctl(
    SECCOMP, FILTER, ctypes.byref(program), 0, 0
):
    print("this system takes no filter of system calls")
    raise SystemExit
"""
USE = """
import warnings
import fastlora, torch
from fastlora.backends import native
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    library = native.load()
print(*(str(each.message) for each in caught), sep="|")
print("none" if isinstance(library, str) else native.available())
print(fastlora.backend(), native.unusable() or native.instruction_set())
x, W, A, B = (torch.randn(40, 40).bfloat16() for _ in range(4))
y = fastlora.functional.lora_linear(x, W, A, B, 0.5).double()
x, W, A, B = (t.double() for t in (x, W, A, B))
want = x @ W.T + 0.5 * x @ A.T @ B.T
print((y - want).norm() < 0.01 * want.norm())
"""


def run_without_amx(asked: str) -> list[str]:
    """What USE prints where the set is missing: of itself, or as the system denies it."""
    deny = "" if MISSING else DENY
    env = {**os.environ, "FASTLORA_CPU_ISA": asked, "FASTLORA_BACKEND": ""}
    run = forks.run(deny + USE, env=env)
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    if len(lines) == 1:
        pytest.skip(lines[0])
    return lines


def reason() -> str:
    return (MISSING or b"the system refuses the permission for AMX tiles (arch_prctl)").decode()


@pytest.mark.skipif(MISSING is None, reason="this build has no amx_bf16")
def test_asking_for_missing_instruction_set_warns_with_the_reason():
    warned, available, backend, result = run_without_amx(AMX.decode())
    others = ", ".join(n for n in native.available().split(", ") if n != AMX.decode())
    said = f"FASTLORA_CPU_ISA: expected none or one of {others}, got 'amx_bf16' ({reason()})"
    assert warned == f"{said}; the native library stays unused"
    assert (available, backend, result) == ("none", f"torch {said}", "tensor(True)")


@pytest.mark.skipif(MISSING is None, reason="this build has no amx_bf16")
def test_system_that_denies_tiles_leaves_the_next_set_in_use():
    """Nothing is said, and results are right."""
    warned, available, backend, result = run_without_amx("")
    others = [n for n in native.available().split(", ") if n != AMX.decode()]
    assert warned == ""
    assert available == ", ".join(others)
    assert (backend, result) == (f"cpu {others[0]}", "tensor(True)")


def test_missing_says_why_for_every_set_of_the_build():
    """Nothing of those that can be used; null of a name that no build has."""
    missing = native.functions().fastlora_cpu_missing
    assert all(missing(name.encode()) == b"" for name in native.available().split(", "))
    assert missing(b"mmx") is None
    assert missing(None) is None
    if MISSING:
        assert AMX.decode() not in native.available()
