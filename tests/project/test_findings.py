"""The scripts of findings/ are pinned, clean up, and are listed."""

import re
import subprocess
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "findings"
SCRIPTS = sorted(FOLDER.glob("*.sh"))


def test_findings_table_lists_every_script():
    listed = re.findall(r"^\| `([^`]+\.sh)` \|", (FOLDER / "README.md").read_text(), re.MULTILINE)
    assert sorted(listed) == [script.name for script in SCRIPTS]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_findings_script_pins_versions_and_cleans_up(script):
    text = script.read_text()
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert re.match(r"#!(/bin/sh|/usr/bin/env bash)\n# \S", text), (
        "no interpreter, or not what it shows"
    )
    assert re.search(r"^set -e", text, re.MULTILINE), "goes on after an error"
    assert "mktemp -d" in text
    assert re.search(r"^trap 'rm -rf", text, re.MULTILINE)
    assert "${PYTHON:-python3}" in text
    assert "import fastlora" not in text
    assert re.search(r"[a-z]==\d", text), "no version is pinned"
