"""Every command that `make gpu` runs exists and covers what it should."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import cases, cli
from benchmarks.__main__ import main as bench
from benchmarks.gpu import __main__ as gpu
from fastlora.commands import main as fastlora_cli

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    """The command takes them out of its environment; other tests want them back."""
    for name in ("TRITON_INTERPRET", "FASTLORA_BACKEND"):
        monkeypatch.delenv(name, raising=False)


def commands(module: str) -> list[tuple[str, list[str]]]:
    """Of the real parts, those of ``python -m module``: name and arguments."""
    found = []
    for part in (*gpu.list_full(), *gpu.list_quick()):
        words = [word.replace("{deadline}", "50") for word in part.command]
        if sys.executable in words[:-1] and words[words.index(sys.executable) + 2] == module:
            found.append((part.name, words[words.index(sys.executable) + 3 :]))
    return found


def test_gpu_checks_cover_all_ops_and_dtypes(monkeypatch):
    asked = []
    monkeypatch.setattr(fastlora_cli, "run_check", lambda options: asked.append(options) or 0)
    for name, words in commands("fastlora"):
        assert fastlora_cli.main(words) == 0, name
    assert all(options.device.type == "cuda" for options in asked)
    full = [options for options in asked if not options.quick and options.save is not None]
    assert all(options.save == Path("kernels/tuning") for options in full)
    triton = [
        (op, dtype)
        for options in full if options.backend == "triton"
        for op in options.op for dtype in options.dtype
    ]  # fmt: skip
    # Each op in each dtype is verified by one process, and by no more.
    every = {(op, d) for op in fastlora_cli.checking.CHECKED for d in fastlora_cli.DTYPES}
    assert sorted(triton) == sorted(every)
    native = [dtype for options in full if options.backend == "cuda" for dtype in options.dtype]
    assert sorted(native) == sorted(fastlora_cli.DTYPES)


def test_every_gpu_benchmark_has_cases(monkeypatch, capsys):
    ours = commands("benchmarks")
    assert {"bench-forward", "bench-rest", "bench-quick"} <= {name for name, _ in ours}
    for name, words in ours:
        assert bench([*words, "--list"]) == 0
        assert capsys.readouterr().out.count("\n") > 0, name
    # What they ask for is what a run looks at.
    seen = []
    monkeypatch.setattr(cli, "_run", lambda args, chosen: seen.append(args) or 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [bench(words) for _, words in ours] == [0] * len(ours)
    assert all(args.resume and args.deadline == 50 and args.device == "cuda" for args in seen)


def test_every_other_gpu_command_exists():
    from benchmarks.gpu import warm

    for _, words in commands("benchmarks.gpu.warm"):
        assert warm.make_parser().parse_args(words).device == "cuda"
    for name in ("model_merge", "serving"):
        assert commands(f"benchmarks.tables.{name}") == [(name, [])]
        assert (ROOT / "benchmarks" / "tables" / f"{name}.py").exists()
    ((_, words),) = commands("pytest")
    collect = [*words[:-1], "tests/functional/test_row_groups.py", "--collect-only"]
    command = [sys.executable, "-m", "pytest", *collect]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, words[-1]) == (0, "tests"), done.stdout + done.stderr


def test_parts_have_unique_names_and_follow_their_dependencies():
    for chosen in (gpu.list_full(), gpu.list_quick()):
        names = [part.name for part in chosen]
        assert len(set(names)) == len(names)
        for i, part in enumerate(chosen):
            assert set(part.after) <= set(names[:i])
            assert part.least <= part.seconds + part.grace


def test_cuda_library_is_built_when_stale(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "LIBRARY", tmp_path / "libfastlora_cuda.so")
    monkeypatch.setenv("NVCC", "no-such-nvcc")
    if not Path("/usr/local/cuda/bin/nvcc").exists():
        assert gpu.explain_no_build() == "there is no nvcc"
    monkeypatch.setenv("NVCC", f"{shutil.which('sh')} -c")
    versions = {"setuptools": "77.0.1"}
    monkeypatch.setattr(gpu.importlib.metadata, "version", lambda name: versions[name])
    assert gpu.explain_no_build() is None
    gpu.LIBRARY.touch()
    assert gpu.explain_no_build() == "the CUDA library is newer than its sources"
    os.utime(gpu.LIBRARY, (0, 0))
    assert gpu.explain_no_build() is None
    versions["setuptools"] = "68.2"
    assert gpu.explain_no_build() == "setuptools 77 or newer is needed, this is 68.2"


def test_gpu_command_lists_but_refuses_without_gpu(capsys, monkeypatch):
    assert gpu.main(["--list"]) == 0
    assert capsys.readouterr().out.count("\n") == len(gpu.list_full())
    if torch.cuda.is_available():
        return
    assert gpu.main(["--quick"]) == 2
    assert "finds no usable CUDA GPU here" in capsys.readouterr().err
    monkeypatch.setattr(gpu, "_PROBE", "raise ImportError('no torch')")
    assert gpu.main([]) == 2
    assert capsys.readouterr().err.endswith("cannot be used: ImportError: no torch\n")
    monkeypatch.setattr(gpu, "_PROBE", "import time; time.sleep(60)")
    monkeypatch.setattr(gpu, "_PROBE_SECONDS", 1)
    assert gpu.main([]) == 2
    assert capsys.readouterr().err == "benchmarks.gpu: torch found no GPU within 1 s\n"


def test_probe_returns_result_folder_and_versions(monkeypatch):
    """As on a GPU, with the CPU's names."""
    as_gpu = (
        "import torch; from benchmarks.harness import machine\n"
        "torch.cuda.is_available = lambda: True\n"
        "machine.find_device_name = lambda device: 'NVIDIA H100 80GB HBM3'\n"
    )
    monkeypatch.setattr(gpu, "_PROBE", as_gpu + gpu._PROBE)
    found = gpu.probe()
    assert found["folder"] == "nvidia-h100-80gb-hbm3"
    assert found["about"]["torch"] == torch.__version__
    assert set(found["about"]) == {"gpu", "torch", "triton", "python", "commit", "tests"}


def test_first_gpu_benchmark_runs_target_cases():
    first = next(part for part in gpu.list_full() if part.name.startswith("bench-"))
    chosen = cases.select("cuda", name=first.command[first.command.index("--case") + 1])
    assert {case.name for case in chosen} == {
        f"linear-{kind}-bf16-M8192-K4096-N4096-R{R}"
        for kind in ("forward", "train")
        for R in (16, 64)
    }
