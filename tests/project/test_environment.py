"""`make setup` installs the locked packages or explains in one line why not."""

import os
import shutil
import subprocess
import sys
import venv
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LOCK = ROOT / "requirements.lock"
TORCH = "torch==2.13.0"

needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="no make here")


def make(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """No index is reached: what would be fetched fails at once."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "MAKE", "PYTHON"))}
    nowhere = {"PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": "http://127.0.0.1:9/simple"}
    return subprocess.run(
        ["make", "--no-print-directory", *map(str, arguments)],
        cwd=ROOT,
        env=clean | nowhere | {"PIP_RETRIES": "1", "no_proxy": "*"} | environment,
        capture_output=True,
        text=True,
    )


def refusal(*arguments: object) -> str:
    """The line that says why: all of the errors but make's own closing one."""
    done = make(*arguments)
    assert done.returncode != 0, done.stdout
    lines = [line for line in done.stderr.splitlines() if not line.startswith("make: ***")]
    assert "Traceback" not in done.stdout + done.stderr
    return " ".join(lines[-1:]) if len(lines) == 1 else pytest.fail(done.stderr)


def half_made_environment(folder: Path) -> Path:
    """As if its making had been interrupted before pip came."""
    venv.create(folder, with_pip=False, symlinks=True)
    return folder


def stamp(folder: Path, torch: str = TORCH) -> None:
    (folder / ".installed").write_text(torch + "\n")


@pytest.fixture
def import_tool(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return import_module


def test_lock_covers_every_extra_of_pyproject(import_tool) -> None:
    tomllib = pytest.importorskip("tomllib")
    requirements = pytest.importorskip("packaging.requirements")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"].values()
    wanted = [*project["build-system"]["requires"], *project["project"]["dependencies"]]
    locked: dict[str, list[str]] = {}
    for name, line in import_tool("environment").read_lock(LOCK):
        locked.setdefault(name, []).append(line.split("==")[1].split()[0])
    for text in [*wanted, *(line for extra in extras for line in extra)]:
        requirement = requirements.Requirement(text)
        for version in locked[requirement.name]:
            assert requirement.specifier.contains(version), f"{text}: locked is {version}"


def test_lock_holds_nothing_specific_to_a_machine() -> None:
    text = LOCK.read_text()
    assert f"\n{TORCH} " in text
    assert f"TORCH  ?= {TORCH}\n" in (ROOT / "Makefile").read_text()
    for word in ("nvidia-", "cuda-", "--hash", "://", "/tmp", "/home", "+cpu"):
        assert word not in text, word


@needs_make
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "there is no such file"),
        (b"torch>=2\n", "line 1: expected `name==version ; marker`, got 'torch>=2'"),
        (b"# nothing\nnumpy==2.0\n", "names no torch"),
        (b"\xff\xfe\x00", "cannot be read"),
    ],
)
def test_make_setup_refuses_a_wrong_lock(tmp_path: Path, content: bytes | None, said: str) -> None:
    lock = tmp_path / "wrong.lock"
    if content is not None:
        lock.write_bytes(content)
    line = refusal("setup", f"VENV={tmp_path / 'venv'}", f"LOCK={lock}")
    assert said in line
    assert f"LOCK={lock}" in line
    assert "make lock" in line
    assert not (tmp_path / "venv").exists()


@needs_make
@pytest.mark.parametrize("target", ["setup", "lock", "test-latest"])
def test_make_refuses_an_older_python(tmp_path: Path, target: str) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    line = refusal(target, f"PYTHON={python}", f"VENV={tmp_path / 'venv'}")
    assert line.startswith(f"PYTHON={python} is no Python 3.10 or newer")


@needs_make
def test_make_setup_refuses_half_made_environment(tmp_path: Path) -> None:
    folder = half_made_environment(tmp_path / "venv")
    stamp(folder)
    arguments = ("setup", f"PYTHON={sys.executable}", f"VENV={folder}")
    assert f"{folder} is half made, it has no pip: `rm -r {folder}`" in refusal(*arguments)
    packages = next(folder.glob("lib/python3*/site-packages"))
    for name in ("pip", "torch", "pytest"):
        (packages / f"{name}.py").touch()
    assert f"{folder} is half made, it has no fastlora" in refusal(*arguments)
    (folder / "bin" / "python").unlink()
    assert f"{folder} is half made, it has no Python" in refusal(*arguments)


@needs_make
def test_make_setup_refuses_folder_of_other_files(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    line = refusal("setup", f"PYTHON={sys.executable}", f"VENV={tmp_path}")
    assert line.startswith(f"setup: VENV={tmp_path} is there and no environment of Python's")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@needs_make
def test_make_setup_says_when_network_is_missing(tmp_path: Path) -> None:
    """What is half made is completed until something is to be fetched."""
    folder = half_made_environment(tmp_path / "venv")
    line = refusal("setup", f"PYTHON={sys.executable}", f"VENV={folder}")
    assert line.startswith("setup: pip reaches no package index: with a network")
    assert list(folder.glob("lib/python3*/site-packages/pip"))
    assert not (folder / ".installed").exists()


@needs_make
def test_make_setup_reinstalls_for_new_lock_or_torch(tmp_path: Path) -> None:
    lock = Path(shutil.copy(LOCK, tmp_path / "copy.lock"))
    stamp(tmp_path)
    arguments = ("-n", "setup", f"VENV={tmp_path}", f"LOCK={lock}")
    assert "--lock" not in make(*arguments).stdout
    assert "--torch" in make(*arguments, "TORCH=torch==2.12.0").stdout
    os.utime(lock, (2**32, 2**32))
    assert f'--lock "{lock}"' in make(*arguments).stdout


def test_list_changes_compares_two_locks(import_tool, tmp_path: Path) -> None:
    lock = import_tool("lock")
    versions = []
    for text in ("torch==1\na==1 ; x == 'y'\na==2\nb==1\n", "torch==1\na==2\nc==3 # via a\n"):
        (tmp_path / "lock").write_text(text)
        versions.append(lock.read_versions(tmp_path / "lock"))
    said = ["a: 1 ; x == 'y', 2 -> 2", "b: 1 -> gone", "c: new -> 3"]
    assert list(lock.list_changes(*versions)) == said


def test_newest_prints_tests_that_newer_packages_break(tmp_path: Path) -> None:
    here = pytest.__version__
    lock = tmp_path / "some.lock"
    lock.write_text(f"torch==0.1\npytest=={here}\nabsent==3\nelsewhere==1 ; sys_platform == 'x'\n")
    test = tmp_path / "test_it.py"
    test.write_text("def test_a():\n    assert 1 == 2\n\n\ndef test_b():\n    assert 1 == 1\n")
    command = [sys.executable, ROOT / "tools" / "newest.py", lock, "-p", "no:cacheprovider", test]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    said = done.stdout.split("\npackage ")[1].split("\n\n")
    assert [row.split()[:2] for row in said[0].splitlines()[1:]] == [
        ["torch", "0.1"],
        ["absent", "3"],
    ]
    assert said[0].split()[-1] == "none"
    assert "1 × assert 1 == 2\n      test_a\n" in said[1]
    assert said[1].endswith("with the newest packages 1 test failed\n")
