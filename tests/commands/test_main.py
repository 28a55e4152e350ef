"""The command line prints what it should and returns the documented exit codes."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastlora
from fastlora.commands import info
from fastlora.commands import main as cli
from fastlora.kernels.choose import records
from fastlora.ops import availability, dispatch
from fastlora.ops.table import OPS
from tests.support import forks

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fastlora", *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )


def info_in_process(**environment: str) -> subprocess.CompletedProcess[str]:
    code = (
        "import runpy, sys; sys.argv.append('info'); runpy.run_module('fastlora', None, '__main__')"
    )
    return forks.run(code, env=os.environ | environment)


def section(text: str, title: str) -> list[str]:
    """The indented lines under a title."""
    lines = text.splitlines()
    rest = lines[lines.index(title) + 1 :]
    return [line for line in rest[: rest.index("") if "" in rest else None] if line[:2] == "  "]


def test_info_lists_ops_and_reasons_they_cannot_run():
    text = info.describe_machine()
    lines = text.splitlines()
    assert lines[0].startswith(f"fastlora {fastlora.__version__} at ")
    versions = {line.split()[0]: line.split(maxsplit=1)[1] for line in lines[1:8]}
    # Which build it is, not every distribution says of itself.
    assert versions["torch"] in (torch.__version__, torch.__version__.partition("+")[0])
    assert set(versions) >= {"python", "triton", "numpy", "safetensors", "peft", "transformers"}
    devices = section(text, "devices")
    assert f"{torch.get_num_threads()} threads" in devices[0]
    assert any("cuda" in line for line in devices[1:])
    backends = {line.split()[0]: line for line in section(text, "backends")}
    assert set(backends) >= set(availability.BACKENDS)
    for name in availability.BACKENDS:
        reason = availability.unusable(name)
        assert ("not usable" in backends[name]) == (reason is not None)
        assert (reason or "usable") in backends[name]
    kernels = section(text, "kernels")
    assert kernels[0] == f"  cpu    runs lora_linear on {dispatch.backend('lora_linear')}"
    assert len([line for line in kernels if " runs lora_linear on " in line]) == len(devices) - (
        not torch.cuda.is_available()
    )
    assert kernels[-1].endswith(f": {records.cache_folder()}")
    chosen = {line.split()[0]: line.split()[1] for line in section(text, "ops on CPU tensors")}
    assert chosen == {op: dispatch.choose(op, torch.device("cpu")) for op in OPS}


@pytest.fixture
def gpu(monkeypatch):
    """As on a machine with a GPU, of which the arguments are verified: (op, dtype) to paths."""
    choice = pytest.importorskip("fastlora.kernels.choose.choice")
    launch = importlib.import_module("fastlora.kernels.tile.launch")

    def install(rows: dict[tuple[str, str], tuple[str, ...]]) -> list[str]:
        def verified(op: str, dtype: str | None, arch: int) -> tuple[str, ...]:
            assert arch == 90
            return tuple(
                p for (o, d), ps in rows.items() if o == op and dtype in (d, None) for p in ps
            )

        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
        monkeypatch.setattr(availability, "no_gpu", lambda: None)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "A GPU")
        monkeypatch.setattr(launch, "arch_of", lambda device: 90)
        monkeypatch.setattr(choice, "verified", verified)
        lines = section(info.describe_machine(), "kernels")[1:-1]
        return [line for line in lines if "rows in one call" not in line]

    return install


def test_info_lists_verified_paths_of_gpu(gpu):
    linear, backward = "lora_linear", "lora_linear_backward"
    both = ("one_pass", "library")
    rows = {(op, dtype): both for op in (linear, backward) for dtype in ("bf16", "bf16+fp32")}
    assert gpu(rows | {(linear, "fp16"): ("one_pass",)}) == [
        "  cuda:0 runs lora_linear on torch (fp32, fp16, fp16+fp32), triton (bf16, bf16+fp32)",
        "         verified lora_linear: one_pass (fp16); one_pass, library (bf16, bf16+fp32)",
        "         verified lora_linear_backward: one_pass, library (bf16, bf16+fp32)",
    ]


def test_info_says_when_nothing_is_verified(gpu):
    first, second = gpu({})
    assert first.startswith("  cuda:0 runs lora_linear on torch (fp32, fp16, bf16")
    assert "plain torch runs" in second
    assert "`fastlora check`" in second


def test_info_says_up_to_how_many_rows_one_call_is_taken(monkeypatch, tmp_path):
    """And where that is a default, since nobody has measured this CPU."""
    choices = pytest.importorskip("fastlora.backends.cpu.choices")
    if availability.unusable("cpu") is not None:
        pytest.skip(availability.unusable("cpu"))
    monkeypatch.setattr(choices, "find_row", lambda *key: None)
    lines = [line for line in info.describe_machine().splitlines() if "rows in one call" in line]
    assert [line.split()[5] for line in lines] == ["lora_linear:", "multi_lora_linear:"]
    assert all(line.count("a default: `fastlora tune` measures") == 3 for line in lines)
    monkeypatch.setattr(choices, "find_row", lambda *key: {"rows": 1})
    assert "default" not in "".join(info._describe_choices())


def test_info_marks_absent_packages_not_installed(monkeypatch):
    absent = {"peft", "triton"}
    find = info.importlib.util.find_spec
    monkeypatch.setattr(
        info.importlib.util, "find_spec", lambda name: None if name in absent else find(name)
    )
    lines = info.describe_machine().splitlines()
    assert {line.split()[0] for line in lines if line.endswith("not installed")} == absent


def test_info_shows_backend_of_environment_variable():
    """In a process of its own: the variable is read once."""
    asked = info_in_process(FASTLORA_BACKEND="triton", TRITON_INTERPRET="0")
    assert asked.returncode == 0
    assert "FASTLORA_BACKEND=triton" in asked.stdout
    found = {
        line.split()[0]: "cannot run" in line
        for line in section(asked.stdout, "ops on CPU tensors")
    }
    assert found == {op: "triton" in OPS[op].backends for op in OPS}
    assert "'nonsense'" in info_in_process(FASTLORA_BACKEND="nonsense").stdout


@pytest.mark.parametrize(
    "arguments, code, says",
    [
        ("info", 0, "backends"),
        ("--version", 0, f"fastlora {fastlora.__version__}"),
        ("--help", 0, "info"),
        ("demo --help", 0, "--model"),
        ("", 2, "COMMAND"),
        ("nonsense", 2, "nonsense"),
        ("info --loud", 2, "--loud"),
        ("demo --seed x", 2, "--seed"),
        ("check --help", 0, "--quick"),
        ("check --device gpu", 2, "expected cpu or cuda[:N], got 'gpu'"),
        ("check --backend gpu", 2, "--backend"),
        ("tune --help", 0, "--shapes"),
        ("merge --help", 0, "--allow-partial"),
        ("tune --shapes 1,2,3", 2, "expected M,K,N,R of 1 or more, got '1,2,3'"),
        ("tune --shapes 1,2,3,4 1,2,3,0", 2, "got '1,2,3,0'"),
        ("tune --kernel conv", 2, "--kernel"),
        ("tune --dtype bf16+fp32", 2, "--dtype"),
        ("tune --device meta", 2, "expected a CUDA device or the CPU to time on, got meta"),
        ("tune --device cpu --shapes 1,2,3,4", 2, "--shapes and --kernel are of a GPU's kernels"),
        ("check --device meta", 2, "expected cpu or cuda[:N], got meta"),
        ("check --device cpu:3", 2, "expected cpu or cuda[:N], got cpu:3"),
    ],
)
def test_main_returns_exit_code_and_message(capsys, arguments, code, says):
    try:
        found = cli.main(arguments.split())
    except SystemExit as stop:  # argparse's way out
        found = stop.code
    assert found == code
    streams = capsys.readouterr()
    assert says in (streams.err if code else streams.out)


@pytest.mark.parametrize("code", [0, 1])
def test_demo_command_passes_options_and_exit_code(monkeypatch, code):
    seen = []

    class Demo:
        @staticmethod
        def run(*args: object, **kwargs: object) -> int:
            seen.append((args, kwargs))
            return code

    monkeypatch.setitem(sys.modules, "fastlora.demo", Demo)
    assert cli.main(["demo", "--model", "m", "--data", "d", "--quick", "--seed", "3"]) == code
    assert seen == [(("m", "d"), {"quick": True, "seed": 3})]


def test_module_runs_as_a_command():
    done = run("--version")
    assert (done.returncode, done.stdout) == (0, f"fastlora {fastlora.__version__}\n")
    assert run("nonsense").returncode == 2
