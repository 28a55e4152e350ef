"""`make setup`: makes an environment with every package of the lock, and fastlora from here.

    python3 tools/environment.py .venv --lock requirements.lock --torch torch==2.13.0
    python3 tools/environment.py .venv-latest --newest

Uses Python's own modules alone, since nothing is installed yet. A failure ends in one line that
says what to do; calling it again goes on where it ended.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCKED = re.compile(r"([A-Za-z0-9._-]+)==([^\s;#+]+)\s*(?:;\s*([^#]+?))?\s*(?:#.*)?")
UNREACHABLE = re.compile(
    "Failed to establish a new connection|Connection refused|Network is unreachable|name resolution"
    "|Name or service not known|timed out|Cannot connect to proxy|Connection broken"
)
UNREACHED = "pip reaches no package index"


class Stop(Exception):
    """Reason why there is no environment, and what to do about it, for people to read."""


def say(what: str) -> None:
    print(what, flush=True)


def read_lock(path: Path) -> list[tuple[str, str]]:
    """Reads each line that counts, with its package's name."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise Stop(f"LOCK={path} cannot be read ({error}); `make lock` writes one") from None
    lines = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip() and not line.lstrip().startswith("#"):
            match = LOCKED.fullmatch(line.strip())
            if match is None:
                raise Stop(
                    f"LOCK={path}, line {number}: expected `name==version ; marker`, "
                    f"got {line.strip()[:60]!r}; `make lock` writes such a file"
                )
            lines.append((match[1].lower(), line))
    if not any(name == "torch" for name, _ in lines):
        raise Stop(f"LOCK={path} names no torch; `make lock` writes a lock")
    return lines


class Environment:
    """Environment of Python's in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.python = folder.absolute() / "bin" / "python"

    def ask(self, code: str) -> str | None:
        """Runs ``code`` there; returns its output, None where it fails or there is no Python.

        -I: what lies in the folder that this runs in is not installed.
        """
        try:
            done = subprocess.run([self.python, "-Ic", code], capture_output=True, text=True)
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    def make(self) -> None:
        """Makes the environment, or completes a half-made one; removes nothing."""
        if self.ask("import pip") is not None:
            return
        folder = self.folder
        if folder.exists() and not (folder.is_dir() and self.is_environment()):
            raise Stop(f"VENV={folder} is there and no environment of Python's: name another place")
        done = subprocess.run(
            [sys.executable, "-m", "venv", folder],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if done.returncode or self.ask("import pip") is None:
            output = " ".join(done.stdout.split())[-500:]
            advice = self.suggest_remaking()
            raise Stop(f"{folder} is half made, it has no pip: {advice}. {output}".rstrip())

    def is_environment(self) -> bool:
        """Whether the folder is an environment of Python's, or empty."""
        return (self.folder / "pyvenv.cfg").is_file() or not any(self.folder.iterdir())

    def suggest_remaking(self) -> str:
        return f"`rm -r {self.folder}`, then the same command makes it anew"

    def pip(self, *arguments: object) -> None:
        """Runs ``pip install``, quiet: if it fails, raises Stop with the reason in a line.

        Python compiles modules at their import: compiling all here took a third of the time.
        """
        command = [self.python, "-m", "pip", "install", "-q", "--no-compile"]
        command += ["--disable-pip-version-check"]
        done = subprocess.run(
            [*map(str, [*command, *arguments])],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if done.returncode:
            raise Stop(explain(done.stdout))

    def check(self) -> None:
        """Checks that packages of other targets are there; an interrupted setup may lack them."""
        needed = ["pip", "torch", "pytest", "fastlora"]
        code = "import importlib.util as u, json; find = u.find_spec; "
        code += f"print(json.dumps([n for n in {needed} if find(n) is None]))"
        missing = json.loads(self.ask(code) or '["Python"]')
        if missing:
            raise Stop(
                f"{self.folder} is half made, it has no {missing[0]}: {self.suggest_remaking()}"
            )


def explain(output: str) -> str:
    """Finds the line of pip's output that says why, and what helps."""
    errors = re.findall("^.*(?:ERROR|user requested).*$", output, re.MULTILINE)
    reason = " ".join(map(str.strip, errors[-4:])) or output.strip()[-300:]
    if UNREACHABLE.search(output):
        return f"{UNREACHED}: with a network, the same command goes on from here. {reason}"
    if "(from versions: none)" in output:
        version = ".".join(map(str, sys.version_info[:2]))
        return f"{UNREACHED} that has it for Python {version}; is there a network? {reason}"
    return f"pip: {reason}"


def has_gpu() -> bool:
    if shutil.which("nvidia-smi") is None:
        return False
    return "GPU" in subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout


def install_torch(requirement: str, pip: Callable[..., None]) -> None:
    """Installs torch; without a GPU the far smaller CPU build, where the index has one."""
    if has_gpu():
        say(f"NVIDIA GPU found: installing {requirement}")
    else:
        say(f"no NVIDIA GPU found: installing {requirement}+cpu")
        try:
            return pip(f"{requirement}+cpu")
        except Stop as stop:
            if UNREACHED in str(stop):
                raise
        say(
            f"pip finds no {requirement}+cpu: installing plain {requirement}, which may bring CUDA "
            "libraries"
        )
    return pip(requirement)


def install(environment: Environment, lock: Path, torch: str) -> None:
    lines = read_lock(lock)
    say(f"making {environment.folder} with the packages of {lock}: compiles the native kernels too")
    environment.make()
    others = [(name, line) for name, line in lines if name != "torch"]
    with tempfile.TemporaryDirectory() as folder:
        chosen = Path(folder, "requirements.txt")
        # Another torch than the lock's may want other versions of what it needs.
        is_locked = any(name == "torch" and line.split()[0] == torch for name, line in lines)
        chosen.write_text(
            "".join(f"{line}\n" for name, line in others if is_locked and name != "triton")
        )
        install_torch(torch, lambda *what: environment.pip(*what, "-c", chosen))
        # A CUDA build of torch has brought the triton that it was made with.
        pins = environment.ask("import importlib.metadata as m; print(m.requires('torch'))") or ""
        brought = {"triton"} if "triton" in pins else set()
        chosen.write_text("".join(f"{line}\n" for name, line in others if name not in brought))
        say(f"installing {len(others)} other lines of {lock}")
        environment.pip("--no-deps", "-r", chosen)
    say("installing fastlora: compiles the native kernels")
    environment.pip("--no-deps", "--no-build-isolation", "-e", ".")


def install_newest(environment: Environment, torch: str) -> None:
    """Installs the newest of everything that pyproject.toml allows, whatever the lock says."""
    say(f"making {environment.folder} with the newest of every package")
    environment.make()
    if torch == "torch":  # pip alone would stay with a build that is there, and take CUDA's
        index = [environment.python, "-m", "pip", "index", "versions", "torch"]
        output = subprocess.run(index, capture_output=True, text=True).stdout
        match = re.match(r"torch \(([^+)]+)", output)
        torch = f"torch=={match[1]}" if match else torch
    try:
        install_torch(torch, lambda what: environment.pip("--upgrade", what))
    except Stop as stop:
        if UNREACHED in str(stop):
            raise
        say(f"{torch} cannot be installed, the newest that can be is tried: {stop}")
        environment.pip("--upgrade", "torch")
    eager = ["--upgrade", "--upgrade-strategy", "eager"]
    environment.pip(*eager, "setuptools>=77")
    with tempfile.TemporaryDirectory() as folder:
        same = Path(folder, "torch.txt")
        version = environment.ask("import importlib.metadata as m; print(m.version('torch'))")
        same.write_text(f"torch=={version}")
        say(f"installing the newest of all others beside torch {version}, and fastlora")
        every = ".[test,demo,bench,docs]"
        environment.pip(*eager, "--no-build-isolation", "-c", same, "-e", every)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--lock", type=Path, help="the packages of this file")
    action.add_argument("--newest", action="store_true", help="the newest of every package")
    action.add_argument("--check", action="store_true", help="only say whether it is whole")
    parser.add_argument("--torch", default="torch")
    options = parser.parse_args(arguments)
    environment = Environment(options.folder)
    try:
        if options.check:
            environment.check()
        elif options.newest:
            install_newest(environment, options.torch)
        else:
            install(environment, options.lock, options.torch)
    except Stop as stop:
        print(f"setup: {stop}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("setup: interrupted: the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
