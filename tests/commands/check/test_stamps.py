"""Stamps record the paths that `fastlora check` passed, and take failed ones back."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch

import fastlora
from fastlora.commands.check import stamps

ROOT = Path(__file__).resolve().parents[3]
FACTS = {"arch": 90, "gpu": "A GPU", "commit": "0000000", "torch": "2", "triton": "3"}
ROW = {"op": "lora_linear", "dtype": "bf16", "path": "one_pass", **FACTS}


@pytest.fixture
def cache(monkeypatch, tmp_path):
    choice = pytest.importorskip("fastlora.kernels.choose.choice")
    monkeypatch.setenv("FASTLORA_CACHE", str(tmp_path))
    choice.forget()
    yield tmp_path
    choice.forget()


def rows(folder: Path) -> list[dict[str, object]]:
    file = folder / "verified.json"
    return json.loads(file.read_text()) if file.exists() else []


def test_stamps_writes_nothing_on_a_cpu(cache):
    made = stamps.Stamps(torch.device("cpu"), None, quick=False)
    made.note("lora_linear", "bf16", "one_pass", passed=True)
    assert rows(cache) == []
    assert "nothing is stamped" in made.summarize()


def test_stamp_of_failure_replaces_stamp_of_pass(cache):
    from fastlora.kernels.choose import choice

    row = ROW | choice.versions() | {"passed": True}
    stamps.write(row, None)
    stamps.write(row | {"path": "library"}, None)
    assert set(choice.verified("lora_linear", "bf16", 90)) >= {"one_pass", "library"}
    stamps.write(row | {"passed": False}, None)
    assert {(r["path"], r["passed"]) for r in rows(cache)} == {
        ("one_pass", False),
        ("library", True),
    }
    assert "one_pass" not in choice.verified("lora_linear", "bf16", 90)


def test_local_failure_outweighs_shipped_stamp(cache, monkeypatch, tmp_path):
    from fastlora.kernels.choose import choice, records

    row = ROW | choice.versions()
    monkeypatch.setattr(records, "SHIPPED", tmp_path / "shipped")
    stamps.write(row, tmp_path / "shipped")
    assert choice.verified("lora_linear", "bf16", 90) == ("one_pass",)
    stamps.write(row | {"passed": False}, None)
    assert choice.verified("lora_linear", "bf16", 90) == ()
    stamps.write(row | {"passed": False, "triton": "another"}, None)
    stamps.write(row | {"passed": True}, None)
    assert choice.verified("lora_linear", "bf16", 90) == ("one_pass",)


def test_find_commit_falls_back_to_version_without_git(monkeypatch):
    git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    try:
        done = subprocess.run(git, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("no git here")
    if done.returncode:
        pytest.skip("no checkout")
    assert stamps.find_commit() in (done.stdout.strip(), done.stdout.strip() + "+changes")
    monkeypatch.setenv("PATH", "")
    assert stamps.find_commit() == fastlora.__version__
