"""fastlora works however it is installed, and installs nothing else of the checkout."""

import email
import json
import os
import shutil
import subprocess
import sys
import tarfile
import textwrap
import venv
import zipfile
from pathlib import Path

import pytest

pytestmark = [pytest.mark.packaging, pytest.mark.shared_start]

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = "libfastlora_cpu" + (".dylib" if sys.platform == "darwin" else ".so")
# A checkout's own libraries too: each test says which ones it builds.
LEFT_BEHIND = (".*", "build", "dist", "results", "*.egg-info", "__pycache__", "*.so", "*.dylib")

# What a user would do first, in whatever way fastlora got there.
PROBE = """
    import importlib.util, json
    import torch, fastlora
    from fastlora import functional as F

    philox = None
    try:
        triton = importlib.util.find_spec("triton")
    except ValueError:  # hidden: sys.modules["triton"] is None
        triton = None
    from fastlora.kernels.choose import records
    assert (records.SHIPPED / records.VERIFIED).is_file()
    if triton is not None:
        import fastlora.kernels.tile.philox
        philox = fastlora.kernels.tile.philox.__file__
    x, w, a, b = (torch.randn(shape) for shape in [(3, 8), (5, 8), (2, 8), (5, 2)])
    y = F.lora_linear(x, w, a, b, 0.5)
    torch.testing.assert_close(y, x @ w.T + 0.5 * (x @ a.T) @ b.T)
    seen = {"fastlora": fastlora.__file__, "philox": philox, "triton": triton is not None}
    print(json.dumps(seen | {"backend": fastlora.backend()}))
"""


def run(*command: object, cwd: Path, **environment: str) -> str:
    """The command's output; its failure fails the test with all that it said.

    Unless the test says otherwise nothing is compiled, which takes long:
    tests/project/test_build.py does.
    """
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "FASTLORA_"))}
    clean["FASTLORA_BUILD"] = "none"
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=clean | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}"
    return done.stdout


def copy_of_checkout(to: Path) -> Path:
    """Builds write next to their sources, so each gets its own tree."""
    return Path(shutil.copytree(ROOT, to, ignore=shutil.ignore_patterns(*LEFT_BEHIND)))


class Site:
    """A throw-away environment that sees every package of the running one except fastlora."""

    def __init__(self, folder: Path) -> None:
        self.others = others = folder / "others"
        others.mkdir(parents=True)
        for entry in filter(os.path.isdir, sys.path):
            if entry.endswith(("site-packages", "dist-packages")):
                for package in Path(entry).iterdir():
                    link = others / package.name
                    if "fastlora" not in package.name and not link.exists():
                        link.symlink_to(package)  # .pth files too: they are inert in here
        venv.create(folder / "env", with_pip=False, symlinks=True)
        self.bin = folder / "env" / "bin"
        self.python = self.bin / "python"
        found = run(self.python, "-c", "import site; print(site.getsitepackages()[0])", cwd=folder)
        self.packages = Path(found.strip())
        (self.packages / "others.pth").write_text(str(others))
        self.elsewhere = folder / "elsewhere"
        self.elsewhere.mkdir()

    def install(self, *what: object, **environment: str) -> None:
        pip = (sys.executable, "-m", "pip", "--python", self.python, "install", "--no-deps", "-q")
        run(*pip, "--no-build-isolation", *what, cwd=self.elsewhere, **environment)

    def probe(
        self, cwd: Path | None = None, before: str = "", backend: str = "torch"
    ) -> tuple[Path, Path | None]:
        """Where fastlora and its kernels came from, having shown that they work on ``backend``."""
        code = before + textwrap.dedent(PROBE)
        seen = json.loads(run(self.python, "-c", code, cwd=cwd or self.elsewhere).splitlines()[-1])
        assert (seen["philox"] is not None) == seen["triton"]
        assert seen["backend"] == backend
        return Path(seen["fastlora"]), seen["philox"] and Path(seen["philox"])

    def info(self, *command: object, cwd: Path | None = None) -> None:
        assert "fastlora" in run(*command, "info", cwd=cwd or self.elsewhere)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Straight from the sources, with the running environment's setuptools."""
    folder = tmp_path_factory.mktemp("wheel")
    tree = copy_of_checkout(folder / "tree")
    (tree / "fastlora" / LIBRARY).touch()  # compiled in place: not for others
    flags = ["--wheel", "--no-isolation", "--outdir", folder]
    run(sys.executable, "-m", "build", *flags, cwd=tree)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def isolated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An sdist, and a wheel from it, where there is no torch: the way of `pip install <sdist>`."""
    folder = tmp_path_factory.mktemp("isolated")
    tree = copy_of_checkout(folder / "tree")
    (tree / "fastlora" / LIBRARY).touch()
    run(sys.executable, "-m", "build", "--outdir", folder, cwd=tree)
    return folder


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def contents(path: Path) -> list[str]:
    with zipfile.ZipFile(path) as archive:
        return archive.namelist()


def test_wheel_contains_exactly_the_package_files(wheel: Path) -> None:
    assert wheel.name.endswith("-py3-none-any.whl")
    names = contents(wheel)
    info = next(name.split("/")[0] for name in names if ".dist-info/" in name)
    assert {name.split("/")[0] for name in names} == {"fastlora", info}
    assert {"fastlora/py.typed", "fastlora/kernels/tile/philox.py"} < set(names)
    assert not [name for name in names if name.endswith((".so", ".dylib"))]
    assert any(name.startswith(f"{info}/") and name.endswith("/LICENSE") for name in names)

    library = {p.relative_to(ROOT) for p in ROOT.glob("fastlora/**/*.py")}
    kernels = {p.relative_to(ROOT) for e in ("py", "json") for p in ROOT.glob(f"kernels/**/*.{e}")}
    expected = {p.as_posix() for p in library | {"fastlora" / p for p in kernels}}
    assert expected == {name for name in names if name.endswith((".py", ".json"))}


def test_wheel_metadata_matches_the_project(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        text = {Path(n).name: archive.read(n).decode() for n in contents(wheel) if "-info/" in n}
    meta = email.message_from_string(text["METADATA"])
    assert meta["Name"] == "fastlora-kernels"
    version = f'__version__ = "{meta["Version"]}"'
    assert version in (ROOT / "fastlora/__init__.py").read_text()
    assert meta["License-Expression"] == "Apache-2.0"
    assert meta["Requires-Python"] == ">=3.10"
    extras = {"peft", "serve", "bench", "demo", "docs", "test"}
    assert set(meta.get_all("Provides-Extra")) == extras
    needed = {r.replace('"', "'") for r in meta.get_all("Requires-Dist") if "extra ==" not in r}
    assert needed == {"torch>=2.10", "numpy", "safetensors", "triton; sys_platform == 'linux'"}
    assert "fastlora = fastlora.commands.main:main" in text["entry_points.txt"]


@pytest.mark.full  # an isolated build fetches setuptools
def test_sdist_contains_sources_and_tests(isolated: Path, wheel: Path) -> None:
    with tarfile.open(next(isolated.glob("*.tar.gz"))) as archive:
        names = {member.name.partition("/")[2] for member in archive if member.isfile()}
    assert {"README.md", "LICENSE", "pyproject.toml", "setup.py", "Makefile"} < names
    for folder in ("fastlora", "kernels", "tests", "benchmarks"):
        missing = {p.relative_to(ROOT).as_posix() for p in ROOT.glob(f"{folder}/**/*.py")} - names
        assert not missing
    compiled = {p.relative_to(ROOT).as_posix() for p in ROOT.glob("csrc/**/*") if p.is_file()}
    assert {Path(name).suffix for name in compiled} == {".h", ".cpp", ".cu"}
    assert compiled < names
    assert not [name for name in names if "__pycache__" in name or name.endswith((".so", ".dylib"))]
    assert sorted(contents(next(isolated.glob("*.whl")))) == sorted(contents(wheel))


@pytest.mark.parametrize("origin", ["wheel", pytest.param("isolated", marks=pytest.mark.full)])
def test_installed_wheel_works_outside_the_checkout(
    origin: str, site: Site, request: pytest.FixtureRequest
) -> None:
    built = request.getfixturevalue(origin)
    site.install(built if origin == "wheel" else next(built.glob("*.whl")))
    fastlora, philox = site.probe()
    assert fastlora.is_relative_to(site.bin.parent)
    assert philox in (None, fastlora.parent / "kernels" / "tile" / "philox.py")
    site.info(site.python, "-m", "fastlora")
    site.info(site.bin / "fastlora")


@pytest.mark.full  # tests/project/test_build.py has a quick one
@pytest.mark.parametrize("mode", ["default", "strict"])
def test_editable_install_uses_the_checkout(mode: str, site: Site, tmp_path: Path) -> None:
    tree = copy_of_checkout(tmp_path / "tree")
    strict = ["--config-settings", "editable_mode=strict"] if mode == "strict" else []
    site.install(*strict, "-e", tree)
    fastlora, philox = site.probe()
    if mode == "default":
        assert fastlora == tree / "fastlora" / "__init__.py"
        assert philox in (None, tree / "kernels" / "tile" / "philox.py")
    else:  # a tree of links in build/
        assert fastlora.is_relative_to(tree / "build")
        assert philox in (None, fastlora.parent / "kernels" / "tile" / "philox.py")
    with (tree / "fastlora" / "__init__.py").open("a") as file:
        file.write("\nEDITED = True\n")
    run(site.python, "-c", "import fastlora; assert fastlora.EDITED", cwd=site.elsewhere)
    site.info(site.python, "-m", "fastlora")
    site.info(site.bin / "fastlora")


@pytest.mark.parametrize(
    "triton", [True, pytest.param(False, marks=pytest.mark.full)], ids=["triton", "no triton"]
)
def test_bare_checkout_works_without_install(triton: bool, site: Site, tmp_path: Path) -> None:
    tree = copy_of_checkout(tmp_path / "tree")
    hide = "" if triton else "import sys; sys.modules['triton'] = None"
    fastlora, philox = site.probe(tree, before=hide)
    assert fastlora == tree / "fastlora" / "__init__.py"
    assert philox in (None, tree / "kernels" / "tile" / "philox.py")
    site.info(site.python, "-m", "fastlora", cwd=tree)


@pytest.mark.parametrize("installed", [False, pytest.param(True, marks=pytest.mark.full)])
def test_kernels_folder_is_not_taken_for_hugging_face(
    installed: bool, site: Site, tmp_path: Path
) -> None:
    """transformers asks for a package called `kernels`: a checkout's folder must not pass as it."""
    pytest.importorskip("transformers")
    code = """
        import sys
        import fastlora, torch, transformers
        small = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, vocab_size=8)
        config = transformers.LlamaConfig(num_attention_heads=2, num_key_value_heads=2, **small)
        transformers.LlamaForCausalLM(config)(torch.arange(4)[None])
        if sys.argv[1] == "True":
            import kernels
            assert kernels.__file__.startswith(sys.prefix)
        else:
            assert not transformers.utils.is_kernels_available()
    """
    if installed:
        (site.packages / "kernels").mkdir()
        (site.packages / "kernels" / "__init__.py").touch()
    else:
        for real in site.others.glob("kernels*"):
            real.unlink()
    tree = copy_of_checkout(tmp_path / "tree")
    run(site.python, "-c", textwrap.dedent(code), installed, cwd=tree)
