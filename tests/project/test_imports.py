"""Folders import only lower folders, and optional packages stay optional."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Top to bottom: a folder imports from itself and from the lines below its own.
FLOORS = """
    __main__
    commands
    demo
    serving/http
    __init__ combining fidelity tensor_parallel
    serving integrations
    model merge_files
    adapters
    modules
    functional rows
    ops
    backends
    kernels/aot inspection
    kernels/multi config
    kernels/linear kernels/merge kernels/choose
    kernels/tile
    moved
"""
FLOOR = {folder_of: n for n, line in enumerate(FLOORS.split("\n")) for folder_of in line.split()}
# What a folder's files may import besides the standard library and fastlora. Inside functions
# anything goes, except in kernels/: that is how optional packages are used.
PACKAGES = {
    "integrations": {"torch", "peft", "transformers", "vllm"},
    "serving/http": {
        "torch",
        "safetensors",
        "fastapi",
        "starlette",
        "pydantic",
        "pydantic_core",
        "jinja2",
        "prometheus_client",
        "uvicorn",
    },
    "demo": {"torch", "peft", "transformers", "psutil", "rich", "tokenizers"},
    "backends": {"torch", "triton"},
    "kernels": {"torch", "numpy", "triton"},
}


def name_of(path: Path) -> str:
    """The module that a file is installed as; kernels/ lies in fastlora then."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    name = ".".join(("fastlora", *parts) if parts[0] == "kernels" else parts)
    return name.removesuffix(".__init__")


FILES = [*ROOT.glob("fastlora/**/*.py"), *ROOT.glob("kernels/**/*.py")]
MODULES = {name_of(path): path.read_text() for path in sorted(FILES)}


def folder_of(module: str) -> str:
    parts = module.split(".")[1:] or ["__init__"]
    inner = "/".join(parts[:2])
    return inner if parts[0] == "kernels" or inner in FLOOR else parts[0]


def list_imports(source: str, typing: bool = False) -> Iterator[tuple[str, bool]]:
    """(module, whether inside a function) of every import; typing: those for type checkers too."""

    def walk(node: ast.AST, lazy: bool) -> Iterator[tuple[str, bool]]:
        if isinstance(node, ast.Import):
            yield from ((alias.name, lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative imports hide the folder"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from ((n if n in MODULES else str(node.module), lazy) for n in names)
        elif typing or not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)):
            lazy = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            for child in ast.iter_child_nodes(node):
                yield from walk(child, lazy)

    yield from walk(ast.parse(source), False)


def list_faults(module: str, source: str) -> list[str]:
    """What a file imports against the rules."""
    own, found = folder_of(module), []
    top = own.split("/")[0]
    usual = {"torch", "numpy", "safetensors"}
    allowed = PACKAGES.get(own, PACKAGES.get(top, usual)) | set(sys.stdlib_module_names)
    for target, lazy in list_imports(source):
        package = target.split(".")[0]
        if package == "fastlora":
            if folder_of(target) != own and FLOOR[folder_of(target)] <= FLOOR[own]:
                found.append(f"{module} imports {target}, which is not below it")
        elif (top == "kernels" or not lazy) and package not in allowed:
            found.append(f"{module} imports {package}, allowed here: {sorted(allowed)}")
    return found


@pytest.mark.parametrize("module", MODULES)
def test_module_imports_only_lower_folders(module: str) -> None:
    assert not list_faults(module, MODULES[module])


@pytest.mark.parametrize(
    "module, source",
    [
        ("fastlora.ops.table", "from fastlora.functional import linear"),
        ("fastlora.ops.table", "def f():\n    import fastlora"),
        ("fastlora.rows.watch", "from fastlora import functional"),
        ("fastlora.serving.model", "from fastlora.serving.http import app"),
        ("fastlora.serving.model", "import fastapi"),
        ("fastlora.modules.linear", "if True:\n    import peft"),
        ("fastlora.kernels.tile.rank", "def f():\n    import peft"),
        ("fastlora.kernels.linear.gemm", "from fastlora.kernels.choose import choice"),
        ("fastlora.kernels.linear.gemm", "from fastlora.ops import invariance"),
    ],
)
def test_faults_finds_forbidden_imports(module: str, source: str) -> None:
    assert list_faults(module, source)


def test_imports_form_no_circle() -> None:
    """Nor do those in functions and those only for type checkers."""
    needs = {m: {t for t, _ in list_imports(s, typing=True) if t in MODULES} - {m}
             for m, s in MODULES.items()}  # fmt: skip
    while free := [m for m, others in needs.items() if not others & needs.keys()]:
        for module in free:
            del needs[module]
    assert not needs


def test_package_binds_no_name_of_a_submodule() -> None:
    """``from package import file`` would give whichever of the two was bound last."""
    for path in (p for p in FILES if p.name == "__init__.py"):
        files = {p.stem for p in path.parent.glob("*.py")}
        for node in ast.walk(ast.parse(path.read_text())):
            for alias in node.names if isinstance(node, ast.ImportFrom) else ():
                own = (
                    f"{node.module}.{alias.name}" == f"{name_of(path)}.{alias.asname or alias.name}"
                )
                assert own or (alias.asname or alias.name) not in files, f"{path}:{node.lineno}"


@pytest.mark.parametrize("module", ["fastlora", "fastlora.commands.main"])
def test_import_of_fastlora_loads_no_optional_packages(module: str) -> None:
    code = f"import sys, {module}; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    loaded = {name.split(".")[0] for name in run.stdout.split()}
    assert "torch" in loaded
    assert not loaded & {"triton", "peft", "transformers", "accelerate", "rich", "matplotlib"}
    assert not loaded & {"fastapi", "uvicorn", "starlette", "pydantic", "prometheus_client"}


def test_kernels_folder_is_no_package() -> None:
    """A kernels/__init__.py would shadow Hugging Face's `kernels` for transformers."""
    assert not list(ROOT.glob("kernels/**/__init__.py"))
