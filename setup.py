"""What pyproject.toml cannot say: where kernels/ goes, and how csrc/ is compiled.

kernels/ has no __init__.py on purpose: a root package of that name would shadow Hugging Face's
`kernels`, which transformers imports. Its Triton files install as fastlora.kernels.

csrc/ becomes up to two libraries in fastlora/, which backends/native.py loads with ctypes. They
know neither Python's nor torch's version, so one py3-none-<platform> wheel serves all.
FASTLORA_BUILD says which: `cpu`, `cuda` (both; either way it is an error when that fails), `none`,
or `auto`, the default: what this machine has a compiler for. CXX and NVCC name the compilers,
FASTLORA_CXXFLAGS adds flags.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_namespace_packages, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CPU, CUDA = "fastlora.libfastlora_cpu", "fastlora.libfastlora_cuda"
SUFFIX = ".dylib" if sys.platform == "darwin" else ".so"

# -ffp-contract=off: merging must have the same bits whatever the compiler; where a multiplication
# and an addition are to be fused, the source says so. The two warnings come from GCC 12's headers.
CXXFLAGS = [
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-Wall",
    "-Icsrc",
]
CXXFLAGS += ["-Wno-ignored-attributes", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]
_AVX2 = ["-DFL_AVX2", "-mavx2", "-mfma", "-mf16c"]
_AVX512 = ["-DFL_AVX512", "-mavx2", "-mfma", "-mf16c", "-mprefer-vector-width=512"]
_AVX512 += [f"-mavx512{part}" for part in ("f", "bw", "dq", "vl")]
# What Python calls, in csrc/cpu.
ENTRIES = ["entry", "entry_merge"]
# kernels.cpp is compiled once for each; the library picks the best that its machine has. Of inline
# code that all share the linker keeps the first object's: portable must come before the others.
INSTRUCTION_SETS = {
    "portable": [],
    "avx2": _AVX2,
    "avx512": _AVX512,
    "avx512_bf16": [*_AVX512, "-mavx512bf16"],
}
# tile_kernels.cpp, likewise; what is not done by tiles is done by a set above. The second one has
# tiles in ordinary instructions: for tests, and never chosen by itself.
TILE_SETS = {
    "amx_bf16": [*_AVX512, "-mavx512bf16"],
    "amx_emulated": [*_AVX2, "-DFL_TILES_EMULATED", "-Wno-psabi"],
}
# Ampere (8.x runs 8.0's code), Hopper, Blackwell; what comes later compiles the last one's PTX.
CUDA_ARCHITECTURES = ("80", "90", "100")
# -fmad=false: as -ffp-contract=off.
NVCCFLAGS = ["-std=c++17", "-O3", "-fmad=false", "-Icsrc", "-Xcompiler=-fPIC,-fvisibility=hidden"]


class NotBuilt(Exception):
    """Why a library was left out."""


def say(what: str) -> None:
    print(f"fastlora: {what}", file=sys.stderr, flush=True)


def compiler(variable: str, *names: str) -> list[str]:
    asked = os.environ.get(variable)
    if asked:
        return shlex.split(asked)
    for name in names:
        if shutil.which(name):
            return [name]
    raise NotBuilt(f"no compiler found (looked for {', '.join(names)}; {variable} names another)")


def run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    except OSError as error:
        raise NotBuilt(f"{command[0]} cannot be run: {error}") from error
    if done.returncode:
        raise NotBuilt(f"{shlex.join(command)} failed:\n{done.stderr.strip()}")
    if done.stderr.strip():
        say(done.stderr.strip())


def build_cpu(target: Path, temporary: Path) -> str:
    """Compiles csrc/cpu; returns what was built, or raises NotBuilt."""
    cxx = compiler("CXX", "c++", "g++", "clang++")
    flags = [*CXXFLAGS, *shlex.split(os.environ.get("FASTLORA_CXXFLAGS", ""))]
    probe = temporary / "probe.cpp"
    probe.write_text("#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n")
    try:
        run([*cxx, "-fopenmp", str(probe), "-o", str(probe.with_suffix(""))])
        openmp = ["-fopenmp"]
    except NotBuilt:
        openmp = []
    x86 = platform.machine() in ("x86_64", "AMD64")
    sets = INSTRUCTION_SETS | TILE_SETS if x86 else {"portable": []}

    def compiled(name: str) -> tuple[str, str | None]:
        extra = [f"-DFL_ISA={name}", *sets[name]]
        kernels = "tile_kernels" if name in TILE_SETS else "kernels"
        source, out = f"csrc/cpu/{kernels}.cpp", str(temporary / f"{name}.o")
        try:
            run([*cxx, *flags, *openmp, *extra, "-c", source, "-o", out])
        except NotBuilt as error:
            return name, str(error)
        return name, None

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        failed = {name: why for name, why in pool.map(compiled, sets) if why}
    if "portable" in failed:
        raise NotBuilt(failed["portable"])
    for name, why in failed.items():
        say(f"this compiler cannot do {name}: {why.splitlines()[-1]}")
    built = [name for name in sets if name not in failed]
    has = [f"-DFL_HAS_{name.upper()}" for name in built]
    for entry in ENTRIES:
        run(
            [*cxx, *flags, *has, "-c", f"csrc/cpu/{entry}.cpp", "-o", str(temporary / f"{entry}.o")]
        )
    objects = [str(temporary / f"{name}.o") for name in (*ENTRIES, *built)]
    target.unlink(missing_ok=True)  # a process may have the old one mapped
    run([*cxx, *flags, *openmp, "-shared", *objects, "-o", str(target)])
    threads = "with OpenMP" if openmp else "without OpenMP: one thread"
    return f"{' '.join(cxx)}, {threads}, for {', '.join(built)}"


def build_cuda(target: Path, temporary: Path) -> str:
    """Compiles csrc/cuda; returns what was built, or raises NotBuilt."""
    nvcc = compiler("NVCC", "nvcc", "/usr/local/cuda/bin/nvcc")
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in CUDA_ARCHITECTURES]
    codes.append(codes[-1].replace("code=sm_", "code=compute_"))
    sources = sorted((ROOT / "csrc/cuda").rglob("*.cu"))
    objects = [str(temporary / f"{source.stem}.o") for source in sources]

    def compiled(source: Path, out: str) -> None:
        run([*nvcc, *NVCCFLAGS, *codes, "-c", str(source.relative_to(ROOT)), "-o", out])

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compiled, sources, objects))
    target.unlink(missing_ok=True)
    run([*nvcc, "-cudart=static", *codes, "-shared", *objects, "-o", str(target)])
    return f"{' '.join(nvcc)}, for {', '.join(f'sm_{arch}' for arch in CUDA_ARCHITECTURES)}"


BUILDERS = {CPU: build_cpu, CUDA: build_cuda}
ASKED = {"auto": (CPU, CUDA), "cpu": (CPU,), "cuda": (CPU, CUDA), "none": ()}
MODE = os.environ.get("FASTLORA_BUILD") or "auto"
if MODE not in ASKED:
    raise SystemExit(f"FASTLORA_BUILD: expected one of {', '.join(ASKED)}, got {MODE!r}")


class BuildNative(build_ext):
    """Compilers called as they are: no Python headers, no torch."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", os.sep) + SUFFIX

    def run(self) -> None:
        for name in BUILDERS:  # an earlier build's would be packed as if they were this one's
            self.built(name).unlink(missing_ok=True)
        super().run()
        # A strict editable install links to all that is listed.
        self.extensions = [ext for ext in self.extensions if self.built(ext.name).exists()]

    def built(self, name: str) -> Path:
        return Path(self.build_lib, self.get_ext_filename(name))

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        temporary = Path(self.build_temp, ext.name).resolve()
        for folder in (target.parent, temporary):
            folder.mkdir(parents=True, exist_ok=True)
        start = time.monotonic()
        try:
            what = BUILDERS[ext.name](target, temporary)
        except NotBuilt as error:
            if MODE != "auto":
                raise SystemExit(f"fastlora: {target.name} cannot be built: {error}") from error
            target.unlink(missing_ok=True)  # an older one, in place, is not what these sources say
            say(f"{target.name} is left out, everything works without it: {error}")
        else:
            say(f"{target.name} built in {time.monotonic() - start:.0f} s ({what})")


class AnyPython(bdist_wheel):
    """The libraries depend on the platform alone."""

    def get_tag(self) -> tuple[str, str, str]:
        tag = super().get_tag()
        return ("py3", "none", tag[2]) if self.distribution.ext_modules else tag


if MODE == "none":
    say("no library is built: FASTLORA_BUILD=none")

KERNELS = find_namespace_packages("kernels", exclude=["*__pycache__*"])

setup(
    packages=[
        *find_packages(include=["fastlora", "fastlora.*"]),
        "fastlora.kernels",
        *(f"fastlora.kernels.{name}" for name in KERNELS),
    ],
    package_dir={"fastlora": "fastlora", "fastlora.kernels": "kernels"},
    # Optional for setuptools too: a file that is not there is not copied.
    ext_modules=[Extension(name, [], optional=True) for name in ASKED[MODE]],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": AnyPython},
)
