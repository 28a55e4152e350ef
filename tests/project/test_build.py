"""The native library is built where it can be, and omitted or refused elsewhere."""

import email
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from tests.project.test_packaging import LIBRARY, Site, contents, copy_of_checkout, run

pytestmark = pytest.mark.packaging

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler here"
)
# What is tested is where the library goes: it may be slow.
QUICKLY = {"FASTLORA_BUILD": "cpu", "FASTLORA_CXXFLAGS": "-O0"}
NOWHERE = {"CXX": "/nonexistent", "NVCC": "/nonexistent"}

# fastlora's C functions ran, and not only could.
NATIVE = """
import sys
import torch, fastlora
from fastlora.backends import cpu, native; from fastlora import functional as F

ran = []
real = native.functions()
class Noting:
    def __getattr__(self, name):
        ran.append(name)
        return getattr(real, name)
native.functions = Noting
assert str(native.PATH) == sys.argv[1], native.PATH
for dtype, error in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
    x, w, a, b = (torch.randn(shape).to(dtype) for shape in [(3, 67), (65, 67), (4, 67), (65, 4)])
    want = x.double() @ w.double().T + 0.5 * (x.double() @ a.double().T) @ b.double().T
    got = F.lora_linear(x, w, a, b, 0.5).double()
    assert (got - want).norm() <= error * want.norm()
assert "fastlora_lora_linear" in ran, ran
"""


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return copy_of_checkout(tmp_path / "tree")


def wheel_from(tree: Path, **environment: str) -> tuple[subprocess.CompletedProcess[str], Path]:
    """What building a wheel said and returned, and the folder of the wheel."""
    code = "from setuptools import build_meta; build_meta.build_wheel('dist')"
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "FASTLORA_"))}
    command, env = [sys.executable, "-c", code], clean | environment
    done = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True)
    return done, tree / "dist"


def read_wheel_metadata(path: Path) -> email.message.Message:
    with zipfile.ZipFile(path) as archive:
        name = next(name for name in contents(path) if name.endswith(".dist-info/WHEEL"))
        return email.message_from_bytes(archive.read(name))


def works_natively(site: Site, library: Path) -> None:
    run(site.python, "-c", NATIVE, library, cwd=site.elsewhere)


@needs_compiler
@pytest.mark.full  # compiles everything, as an editable installation does
def test_wheel_from_sdist_contains_native_library(tree: Path, site: Site, tmp_path: Path) -> None:
    """By way of an sdist, where there is no torch; for any Python, on this platform alone."""
    command = (sys.executable, "-m", "build", "--outdir", tmp_path / "dist")
    said = run(*command, cwd=tree, **QUICKLY)
    assert f"{LIBRARY} built in" in said
    wheel = next((tmp_path / "dist").glob("*.whl"))
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert wheel.name.endswith(f"-py3-none-{platform}.whl")
    assert read_wheel_metadata(wheel)["Root-Is-Purelib"] == "false"
    assert read_wheel_metadata(wheel).get_all("Tag") == [f"py3-none-{platform}"]
    names = contents(wheel)
    assert [n for n in names if n.endswith((".so", ".dylib"))] == [f"fastlora/{LIBRARY}"]
    assert not [name for name in names if name.endswith((".cpp", ".h", ".cu", ".o"))]

    site.install(wheel)
    fastlora, _ = site.probe(backend="cpu")
    assert fastlora.is_relative_to(site.packages)
    works_natively(site, fastlora.parent / LIBRARY)


@pytest.mark.full  # the wheel without compilers is quick
@needs_compiler
@pytest.mark.parametrize("mode", ["default", pytest.param("strict", marks=pytest.mark.full)])
def test_editable_install_builds_native_library(mode: str, tree: Path, site: Site) -> None:
    strict = ["--config-settings", "editable_mode=strict"] if mode == "strict" else []
    site.install(*strict, "-e", tree, **QUICKLY)
    fastlora, _ = site.probe(backend="cpu")
    assert fastlora.is_relative_to(tree)
    works_natively(site, fastlora.parent / LIBRARY)


def test_wheel_omits_libraries_without_compilers(tree: Path, site: Site) -> None:
    for _ in range(2):
        done, folder = wheel_from(tree, FASTLORA_BUILD="auto", **NOWHERE)
        assert done.returncode == 0, done.stderr
        for kind in ("cpu", "cuda"):
            name = LIBRARY.replace("cpu", kind)
            why = f"fastlora: {name} is left out, everything works without it: /nonexistent cannot"
            assert why in done.stderr
        wheel = next(folder.glob("*.whl"))
        assert not [name for name in contents(wheel) if name.endswith((".so", ".dylib"))]
        # The second time: what an earlier build compiled is not packed.
        built = next(tree.glob("build/lib*/fastlora"))
        (built / LIBRARY).touch()
        (built / LIBRARY.replace("cpu", "cuda")).touch()
    site.install(wheel)
    site.probe(backend="torch")


@pytest.mark.parametrize("mode", ["default", pytest.param("strict", marks=pytest.mark.full)])
def test_editable_install_works_without_compilers(mode: str, tree: Path, site: Site) -> None:
    strict = ["--config-settings", "editable_mode=strict"] if mode == "strict" else []
    site.install(*strict, "-e", tree, FASTLORA_BUILD="auto", **NOWHERE)
    fastlora, _ = site.probe(backend="torch")
    assert fastlora.is_relative_to(tree)


def test_wheel_is_pure_when_build_is_none(tree: Path) -> None:
    done, folder = wheel_from(tree, FASTLORA_BUILD="none")
    assert done.returncode == 0, done.stderr
    assert "no library is built: FASTLORA_BUILD=none" in done.stderr
    wheel = next(folder.glob("*.whl"))
    assert wheel.name.endswith("-py3-none-any.whl")
    assert read_wheel_metadata(wheel)["Root-Is-Purelib"] == "true"


@pytest.mark.parametrize(
    "environment, why",
    [
        ({"CXX": "/nonexistent"}, "/nonexistent cannot be run: "),
        ({"PATH": "", "CXX": ""}, "no compiler found (looked for c++, g++, clang++; CXX names"),
        ({"CXX": "false"}, "csrc/cpu/kernels.cpp -o "),
    ],
    ids=["missing", "none", "failing"],
)
def test_build_fails_when_requested_library_cannot_compile(
    environment, why: str, tree: Path
) -> None:
    done, folder = wheel_from(tree, FASTLORA_BUILD="cpu", **environment)
    assert done.returncode != 0
    assert f"fastlora: {LIBRARY} cannot be built: " in done.stderr
    assert why in done.stderr
    assert not list(folder.glob("*.whl"))


def test_build_refuses_unknown_library_choice(tree: Path) -> None:
    done, _ = wheel_from(tree, FASTLORA_BUILD="gpu")
    assert done.returncode != 0
    assert "FASTLORA_BUILD: expected one of auto, cpu, cuda, none, got 'gpu'" in done.stderr
