"""The command line: what it prints, and the exit codes that scripts read."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastlora
from fastlora import cli, dispatch, ops

ROOT = Path(__file__).resolve().parent.parent


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fastlora", *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )


def section(text: str, title: str) -> list[str]:
    """The indented lines under a title."""
    lines = text.splitlines()
    rest = lines[lines.index(title) + 1 :]
    return [line for line in rest[: rest.index("") if "" in rest else None] if line[:2] == "  "]


def test_info_says_what_runs_and_why_not():
    text = cli.info()
    lines = text.splitlines()
    assert lines[0].startswith(f"fastlora {fastlora.__version__} at ")
    versions = {line.split()[0]: line.split(maxsplit=1)[1] for line in lines[1:8]}
    assert versions["torch"] == torch.__version__
    assert set(versions) >= {"python", "triton", "numpy", "safetensors", "peft", "transformers"}
    devices = section(text, "devices")
    assert f"{torch.get_num_threads()} threads" in devices[0]
    assert any("cuda" in line for line in devices[1:])
    backends = {line.split()[0]: line for line in section(text, "backends")}
    assert set(backends) >= set(dispatch.BACKENDS)
    for name in dispatch.BACKENDS:
        reason = dispatch.unusable(name)
        assert ("not usable" in backends[name]) == (reason is not None)
        assert (reason or "usable") in backends[name]
    chosen = {line.split()[0]: line.split()[1] for line in section(text, "ops")}
    assert chosen == {op: dispatch.choose(op, torch.device("cpu")) for op in ops.SCHEMAS}


def test_info_tells_an_absent_package(monkeypatch):
    absent = {"peft", "triton"}
    find = cli.importlib.util.find_spec
    monkeypatch.setattr(
        cli.importlib.util, "find_spec", lambda name: None if name in absent else find(name)
    )
    lines = cli.info().splitlines()
    assert {line.split()[0] for line in lines if line.endswith("not installed")} == absent


def test_a_backend_that_was_asked_for_shows():
    """In a process of its own: the variable is read once."""
    asked = run("info", FASTLORA_BACKEND="triton")
    assert asked.returncode == 0
    assert "FASTLORA_BACKEND=triton" in asked.stdout
    assert all("cannot run" in line for line in section(asked.stdout, "ops"))
    assert "'nonsense'" in run("info", FASTLORA_BACKEND="nonsense").stdout


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
    ],
)
def test_exit_codes(capsys, arguments, code, says):
    try:
        found = cli.main(arguments.split())
    except SystemExit as stop:  # argparse's way out
        found = stop.code
    assert found == code
    streams = capsys.readouterr()
    assert says in (streams.err if code else streams.out)


@pytest.mark.parametrize("code", [0, 1])
def test_demo_passes_its_options_and_its_code_on(monkeypatch, code):
    seen = []

    class Demo:
        @staticmethod
        def run(*args: object, **kwargs: object) -> int:
            seen.append((args, kwargs))
            return code

    monkeypatch.setitem(sys.modules, "fastlora.demo", Demo)
    assert cli.main(["demo", "--model", "m", "--data", "d", "--quick", "--seed", "3"]) == code
    assert seen == [(("m", "d"), {"quick": True, "seed": 3})]


def test_the_module_runs_as_a_command():
    done = run("--version")
    assert (done.returncode, done.stdout) == (0, f"fastlora {fastlora.__version__}\n")
    assert run("nonsense").returncode == 2
