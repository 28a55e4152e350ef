"""The API reference lists every public name, and the site builds from the repository."""

from __future__ import annotations

import os
import pkgutil
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import fastlora
from fastlora import functional

ROOT = Path(__file__).resolve().parents[2]
REFERENCE = ROOT / "docs" / "reference"


def directives() -> list[str]:
    """What the reference is made of: the names after ``:::``."""
    texts = [page.read_text("utf-8") for page in sorted(REFERENCE.glob("*.md"))]
    return [name for text in texts for name in re.findall(r"(?m)^::: (\S+)$", text)]


def test_api_reference_lists_every_public_name_once():
    public = {f"fastlora.{name}" for name in fastlora.__all__}
    public |= {f"fastlora.functional.{name}" for name in functional.__all__}
    found = Counter(directives())
    assert sorted(public - found.keys()) == []
    assert [name for name, times in found.items() if times > 1] == []


def test_api_reference_names_exist_and_have_docstrings():
    for name in directives():
        assert pkgutil.resolve_name(name).__doc__, name


def test_site_builds_without_warnings_or_other_hosts(tmp_path):
    for package in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(package)
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path]
    quiet = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=quiet, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pages = {page.relative_to(tmp_path).as_posix(): page for page in tmp_path.rglob("*.html")}
    assert {"index.html", "changelog.html", "reference/functional.html"} < pages.keys()
    foreign = r'<(?:script|link|img|iframe)[^>]*="(?:https?:)?//[^>]*>'
    found = {name: re.findall(foreign, page.read_text("utf-8")) for name, page in pages.items()}
    assert {name: tags for name, tags in found.items() if tags} == {}
    # README's links into docs/ lead to pages of the site.
    assert 'href="merging.html"' in pages["index.html"].read_text("utf-8")
    shown = pages["reference/functional.html"].read_text("utf-8")
    assert 'id="fastlora.functional.lora_linear"' in shown
