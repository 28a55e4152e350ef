"""`make lock`: writes the lock anew with uv, which pip fetches, and says what changed.

    python3 tools/lock.py requirements.lock --torch torch==2.13.0 --upgrade

Further options are uv's: --upgrade takes the newest of everything, --upgrade-package NAME of one.
pyproject.toml has the ranges and, in [tool.uv], what holds for the lock alone.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from environment import ROOT, Environment, Stop, read_lock, say

UV = "uv==0.13.9"
# One file for all: each line has the versions and platforms that it is for. A package without a
# wheel would have to be built to be resolved. No host of an index belongs into the file.
COMPILE = ["pip", "compile", "--quiet", "--universal", "--python-version", "3.10", "--no-build"]
COMPILE += ["--all-extras", "--no-emit-index-url", "--no-emit-find-links"]
COMPILE += ["--annotation-style", "line", "--custom-compile-command", "make lock"]


def write(lock: Path, torch: str, options: Sequence[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder, "lock")
        if lock.is_file():  # its versions are what stays where no upgrade is asked for
            shutil.copyfile(lock, written)
        environment = Environment(Path(folder, "uv"))
        environment.make()
        environment.pip(UV)
        command = [environment.folder / "bin" / "uv", *COMPILE, *options]
        done = subprocess.run(
            [*command, "pyproject.toml", "-", "--output-file", written],
            cwd=ROOT,
            env=os.environ | {"UV_PYTHON_DOWNLOADS": "never", "UV_NO_PROGRESS": "1"},
            input=torch,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if done.returncode:
            raise Stop(f"uv finds no lock, nothing is written:\n{done.stdout.strip()}")
        text = written.read_bytes()
        if not lock.is_file() or lock.read_bytes() != text:  # a newer file means a new environment
            lock.write_bytes(text)


def read_versions(lock: Path) -> dict[str, str]:
    """Reads the versions of each package, with what each is for where there are several."""
    lines_of: dict[str, list[str]] = {}
    for name, line in read_lock(lock) if lock.is_file() else []:
        lines_of.setdefault(name, []).append(line.split("#")[0].split("==", 1)[1].strip())
    return {name: ", ".join(sorted(lines)) for name, lines in lines_of.items()}


def list_changes(old: dict[str, str], new: dict[str, str]) -> Iterator[str]:
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name):
            yield f"{name}: {old.get(name, 'new')} -> {new.get(name, 'gone')}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("lock", type=Path)
    parser.add_argument("--torch", required=True)
    options, uv_options = parser.parse_known_args(arguments)
    try:
        old = read_versions(options.lock)
        write(options.lock, options.torch, uv_options)
        changed = list(list_changes(old, read_versions(options.lock)))
    except Stop as stop:
        print(f"lock: {stop}", file=sys.stderr)
        return 1
    say("\n".join(changed) or "nothing has changed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
