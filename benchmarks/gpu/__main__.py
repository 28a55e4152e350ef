"""``make gpu``: what is worth most on a GPU first, in so many minutes; a second run goes on.

``python -m benchmarks.gpu [--quick] [--again] [--list] [--minutes N]``, from a bare checkout, with
python3's own torch, triton, numpy, pytest and safetensors. Exit code: 0 when all that ran is well,
1 when a part failed, 2 when there is no GPU to use, 130 when it was ended.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import RESULTS, ROOT
from benchmarks.gpu import parts
from benchmarks.gpu.parts import Part

LIBRARY = ROOT / "fastlora" / "libfastlora_cuda.so"
MINUTES, QUICK_MINUTES = 7.5, 1.9
# A container's share of a large machine is rarely more.
CORES = min(16, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 16)

# Runs in a process of its own: it may hang, and must not hold the GPU that the parts need.
_PROBE = """
import hashlib, json, pathlib, torch
from benchmarks.harness import machine
if not torch.cuda.is_available():
    print(json.dumps({"refused": f"torch {torch.__version__} finds no usable CUDA GPU here"}))
    raise SystemExit
facts, tests = machine.collect_facts("cuda"), hashlib.sha256()
for file in sorted(pathlib.Path("tests").glob("*.py")):
    tests.update(file.read_bytes())
versions = {name: facts["versions"][name] for name in ("torch", "triton", "python")}
about = {"gpu": facts["device_name"], **versions, "commit": facts["commit"]}
about["tests"] = tests.hexdigest()[:12]
print(json.dumps({"folder": machine.name_folder("cuda"), "about": about}))
"""
_PROBE_SECONDS = 120

# Ops that share kernels are checked by one process, groups side by side.
_CHECKED = {
    "forward": ("lora_linear", "lora_add_"),
    "backward": ("lora_linear_backward",),
    "many": ("multi_lora_linear", "multi_lora_add_", "packed_lora_linear", "packed_lora_add_"),
    "many-backward": ("multi_lora_linear_backward",),
    "merge": ("merge_", "unmerge_", "swap_"),
}
# The dtypes of the targets, then the others.
_FIRST, _LATER = ("bf16", "bf16+fp32"), ("fp16", "fp32", "tf32", "fp16+fp32")
_ONE_THREAD = {"OMP_NUM_THREADS": "1"}


def need_modules(*names: str) -> Callable[[], str | None]:
    """Returns a function that says which of the modules is not installed."""

    def missing() -> str | None:
        absent = [name for name in names if importlib.util.find_spec(name) is None]
        return f"{', '.join(absent)} not installed" if absent else None

    return missing


def explain_no_library() -> str | None:
    return None if LIBRARY.exists() else "there is no CUDA library"


def need_tool(name: str, and_too: Callable[[], str | None]) -> Callable[[], str | None]:
    return lambda: and_too() if shutil.which(name) else f"there is no {name}"


def explain_no_build() -> str | None:
    """Says why the CUDA library is not to be built; None where it is."""
    nvcc = os.environ.get("NVCC", "nvcc").split() or ["nvcc"]
    if not shutil.which(nvcc[0]) and not Path("/usr/local/cuda/bin/nvcc").exists():
        return "there is no nvcc"
    try:
        version = importlib.metadata.version("setuptools")
    except importlib.metadata.PackageNotFoundError:
        return "setuptools not installed"
    if int(re.match(r"\d*", version)[0] or 0) < 77:
        return f"setuptools 77 or newer is needed, this is {version}"
    sources = [ROOT / "setup.py", ROOT / "csrc/fastlora.h", *(ROOT / "csrc/cuda").rglob("*.*")]
    if LIBRARY.exists() and LIBRARY.stat().st_mtime > max(s.stat().st_mtime for s in sources):
        return "the CUDA library is newer than its sources"
    return None


def check(name: str, dtypes: Sequence[str], *args: str, **options: Any) -> Part:
    command = ["fastlora", "check", "--device", "cuda", "--save", "kernels/tuning", *args]
    for dtype in dtypes:
        command += ["--dtype", dtype]
    options = {"seconds": 180, "environment": _ONE_THREAD, **options}
    return Part(f"check-{name}", (sys.executable, "-m", *command), **options)


def check_triton(dtype: str, *args: str, **options: Any) -> list[Part]:
    """Makes a part for each group of ops: most of their time goes into compiling."""
    return [
        check(
            f"{dtype}-{name}", [dtype], *args, "--backend", "triton",
            *(f"--op={op}" for op in ops), missing=need_modules("triton"), **options,
        )
        for name, ops in _CHECKED.items()
    ]  # fmt: skip


def check_cuda(name: str, dtypes: Sequence[str], *args: str, **options: Any) -> Part:
    options = {"after": ("build",), "missing": explain_no_library, **options}
    return check(f"cuda-{name}", dtypes, *args, "--backend", "cuda", **options)


def warm(seconds: float, *args: str) -> Part:
    jobs = max(1, CORES * 3 // 8)
    command = ("benchmarks.gpu.warm", "--device", "cuda", "--jobs", str(jobs), *args)
    command += ("--deadline", "{deadline}")
    return Part(
        "warm", (sys.executable, "-m", *command), seconds, cores=jobs,
        missing=need_modules("triton"), again=True, environment=_ONE_THREAD,
    )  # fmt: skip


def bench(name: str, seconds: float, *args: str, **options: Any) -> Part:
    """Makes a part that begins no case after its deadline and skips what this commit measured."""
    command = ("benchmarks", "--device", "cuda", "--resume", "--timeout", "55", *args)
    command += ("--deadline", "{deadline}")
    options = {"grace": 60, "least": 80, "cores": None, "again": True, **options}
    return Part(f"bench-{name}", (sys.executable, "-m", *command), seconds, **options)


def table(module: str, seconds: float, *needed: str) -> Part:
    return Part(
        module, (sys.executable, "-m", f"benchmarks.tables.{module}"), seconds, least=seconds / 2,
        cores=None, missing=need_modules(*needed), document=True,
    )  # fmt: skip


def sanitize(backend: str, missing: Callable[[], str | None], *args: str) -> Part:
    command = ("compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9", sys.executable)
    command += ("-m", "fastlora", "check", "--device", "cuda", "--backend", backend, *args)
    return Part(
        f"sanitize-{backend}", (*command, "--dtype", "bf16"), 240, least=60,
        missing=need_tool("compute-sanitizer", missing), environment=_ONE_THREAD,
    )  # fmt: skip


# Built elsewhere and moved, so that no process loads half a library.
_BUILD = "{python} setup.py -q build_ext -j 2 --build-lib {to} --build-temp {to}/objects && "
_BUILD += "mv {to}/fastlora/libfastlora_*.so fastlora/"


def list_full() -> list[Part]:
    """Lists verified kernels and the targets' cases first, then the tests, then all else."""
    build = _BUILD.format(python=shlex.quote(sys.executable), to="build/gpu")
    processes = min(8, CORES)
    workers = ("-n", str(processes)) if need_modules("xdist")() is None else ()
    tests = (sys.executable, "-m", "pytest", "-q", "-m", "cuda", *workers, "tests")
    return [
        Part(
            "build", ("sh", "-c", build), 240, least=60, cores=max(1, CORES // 4),
            missing=explain_no_build, again=True, environment={"FASTLORA_BUILD": "cuda"},
        ),
        *(part for dtype in _FIRST for part in check_triton(dtype)),
        warm(120),
        check_cuda("bf16", _FIRST),
        bench("forward", 90, "--case", "linear-*-M8192-K4096-N4096-R??"),
        bench("merge", 40, "--case", "merge*-bf16-K4096-N4096-R16"),
        bench("decode", 80, "--case", "multi-decode-*-K4096-N4096-R16-*-distinct"),
        # They compile all along; nothing is timed meanwhile.
        Part("tests", tests, 240, least=90, cores=processes, missing=need_modules("pytest")),
        *(part for dtype in _LATER for part in check_triton(dtype, least=30)),
        check_cuda("others", _LATER, least=30),
        table("model_merge", 60),
        bench("rest", 600),
        table("serving", 180, "peft", "transformers"),
        sanitize("triton", need_modules("triton"), "--quick"),
        sanitize("cuda", explain_no_library),
    ]  # fmt: skip


def list_quick() -> list[Part]:
    """Lists checks of small shapes, which stamp nothing, and a few cases of every suite."""
    options = {"seconds": 60, "grace": 5, "least": 20}
    return [
        *check_triton("bf16", "--quick", **options),
        check_cuda("bf16", ["bf16"], "--quick", after=(), **options),
        warm(40, "--quick"),
        bench("quick", 60, "--quick", grace=15, least=25),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="in two minutes")
    parser.add_argument("--again", action="store_true", help="what an earlier run has done, too")
    parser.add_argument("--list", action="store_true", help="name the parts and stop")
    parser.add_argument("--minutes", type=float, help=f"default: {MINUTES}, quick {QUICK_MINUTES}")
    args = parser.parse_args(argv)
    chosen = list_quick() if args.quick else list_full()
    if args.list:
        for part in chosen:
            print(f"{part.name}: {part.missing() or ' '.join(part.command)}")
        return 0
    began = time.monotonic()
    for name in ("TRITON_INTERPRET", "FASTLORA_BACKEND"):
        os.environ.pop(name, None)  # they would have the parts measure something else
    device = probe()
    if "refused" in device:
        print(f"benchmarks.gpu: {device['refused']}", file=sys.stderr)
        return 2
    folder = RESULTS / (device["folder"] + ("-quick" if args.quick else ""))
    minutes = args.minutes or (QUICK_MINUTES if args.quick else MINUTES)
    seconds = 60 * minutes - (time.monotonic() - began)
    return run(chosen, folder, device["about"], seconds, again=args.again)


def run(
    chosen: Sequence[Part], folder: Path, identity: dict[str, Any], seconds: float, *, again: bool
) -> int:
    """Runs the parts, prints their states and the targets, and returns the exit code."""
    about = ", ".join(f"{name} {value}" for name, value in identity.items())
    print(f"{about}\nresults and logs in {folder}", flush=True)
    for number in (signal.SIGTERM, signal.SIGHUP):  # as Ctrl-C: a connection may be lost
        signal.signal(number, _interrupt)
    running = parts.Run(
        chosen, folder, identity, seconds=seconds, cores=CORES, again=again, say=_print_now
    )
    code = 0
    try:
        running()
    except KeyboardInterrupt:
        code = 130
    bad = any(state["state"] in parts.BAD for state in running.states.values())
    print(f"\n{parts.summarize(running.states)}\n", flush=True)
    targets = [sys.executable, "-m", "benchmarks.reports.targets", str(folder)]
    if code == 0:
        subprocess.run(targets, cwd=ROOT, timeout=_PROBE_SECONDS, check=False)
    return code or int(bad)


def probe() -> dict[str, Any]:
    """Returns the GPU's folder of results and its versions, or why it is ``refused``."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", _PROBE], cwd=ROOT, capture_output=True, text=True,
            timeout=_PROBE_SECONDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"refused": f"torch found no GPU within {_PROBE_SECONDS} s"}
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        return {"refused": f"{sys.executable} cannot be used: {last}"}
    return json.loads(done.stdout.splitlines()[-1])


def _print_now(what: str) -> None:
    print(what, flush=True)


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
