"""The house's floor plan: imports point down, optional packages stay optional."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Top to bottom. A module imports from its own layer and those below; a name stands for a file of
# fastlora/ or for everything in a folder. fastlora.kernels is below all.
LAYERS = {
    "commands": ["__main__", "cli", "merge_command", "demo"],
    "checks and timings": ["selftest", "tuning", "jobs", "stamps", "progress"],
    "what is checked of other ops": ["formula_multi", "formula_merge"],
    "what is checked": ["formula"],
    "facade": ["__init__"],
    "beyond one model": ["serving", "integrations"],
    "models": ["inject", "checkpoint", "merging", "merge_files", "training"],
    "heads of classifiers": ["heads"],
    "what a model is asked for": ["targets", "injection", "tied"],
    "layers of several adapters": ["multi_modules"],
    "layers placed over processes": ["tensor_parallel"],
    "layers": ["modules", "conv1d", "initial", "mergeable"],
    "combined adapters": ["combining", "combining_files"],
    "weights of the base in files": ["base_copies"],
    "modules trained whole": ["saved_modules", "trial"],
    "tensors over processes": ["sharding", "gathering"],
    "settings and files": ["config", "adapter_files", "adapter_tensors", "stored"],
    "names in settings": ["matching", "refusals", "loaded_names", "adapter_hints"],
    "rows of a batch": ["routing"],
    "rows followed through a model": ["rows"],
    "modules and their places": ["wrapping"],
    "functions": ["functional"],
    "merges upon each other": ["merge_stack"],
    "functions of many adapters": ["functional_multi", "functional_merge"],
    "ops of written programs": ["programs"],
    "gradients": ["autograd"],
    "ops": ["ops"],
    "choice of backend": ["dispatch"],
    "backends": [
        "reference",
        "reference_multi",
        "cpu",
        "cpu_linear",
        "cpu_multi",
        "cpu_merge",
        "cuda",
    ],
    "CUDA kernels as ops": ["cuda_linear", "cuda_multi", "cuda_merge"],
    "calls of the CUDA library": ["cuda_call"],
    "what was asked for": ["invariance"],
    "checks of calls": ["calls", "checks_multi", "checks_merge"],
    "helpers": [
        "availability",
        "bypassed",
        "checks",
        "each",
        "interrupts",
        "receipt",
        "exact",
        "delta",
        "dropout",
        "fidelity",
        "flops",
        "grouping",
        "library",
        "listing",
        "products",
        "modes",
        "native",
        "packed",
        "plain",
        "pruning",
        "sources",
    ],
}

# What importing a file may import besides the standard library and fastlora. Inside its functions
# anything goes, except in kernels/: that is how optional packages are used.
PACKAGES = {
    "fastlora": {"torch", "numpy", "safetensors"},
    "fastlora.integrations": {"torch", "peft", "transformers"},
    "fastlora.demo": {"torch", "peft", "transformers", "psutil", "rich", "tokenizers"},
    "fastlora.kernels": {"torch", "numpy", "triton"},
}

LEVEL = {name: level for level, names in enumerate(reversed(LAYERS.values())) for name in names}
KERNELS = -1


class Import(NamedTuple):
    line: int
    module: str  # absolute and dotted; for `from m import a` one of m and one of m.a
    lazy: bool  # inside a function


def name_of(path: Path, root: Path) -> str:
    """The module that a file is installed as: kernels/philox.py is fastlora.kernels.philox."""
    parts = list(path.relative_to(root).with_suffix("").parts)
    if parts[0] == "kernels":
        parts.insert(0, "fastlora")
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def sources(root: Path) -> dict[str, Path]:
    files = [*root.glob("fastlora/**/*.py"), *root.glob("kernels/**/*.py")]
    return {name_of(path, root): path for path in sorted(files)}


def imports(source: str, package: str, modules: set[str]) -> Iterator[Import]:
    """Every import in a file of `package`, without those that only a type checker sees."""

    def walk(node: ast.AST, lazy: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(node.lineno, alias.name, lazy)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) + 1 - node.level]
            above = base if node.level else []
            module = ".".join([*above, *(node.module.split(".") if node.module else [])])
            for alias in node.names:
                inner = f"{module}.{alias.name}"
                known = inner in modules or any(name.startswith(f"{inner}.") for name in modules)
                yield Import(node.lineno, inner if known else module, lazy)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.orelse:
                yield from walk(child, lazy)
        else:
            inside = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            for child in ast.iter_child_nodes(node):
                yield from walk(child, inside)

    yield from walk(ast.parse(source), False)


def level_of(module: str) -> int:
    parts = module.split(".")
    if parts[1:2] == ["kernels"]:
        return KERNELS
    name = parts[1] if len(parts) > 1 else "__init__"
    assert name in LEVEL, f"fastlora/{name} is new: add it to LAYERS in tests/test_imports.py"
    return LEVEL[name]


def faults(module: str, source: str, modules: set[str], is_package: bool = False) -> list[str]:
    """What one file imports against the rules, as readable lines."""
    own, found = level_of(module), []
    package = module if is_package else module.rpartition(".")[0]
    allowed = PACKAGES.get(".".join(module.split(".")[:2]), PACKAGES["fastlora"])
    strict = own == KERNELS
    for line, target, lazy in imports(source, package, modules):
        top = target.split(".")[0]
        if top == "fastlora":
            if level_of(target) > own:
                found.append(f"{module}:{line} imports {target}, which is above it")
        elif (strict or not lazy) and top not in allowed | sys.stdlib_module_names:
            found.append(f"{module}:{line} imports {top}, allowed here: {sorted(allowed)}")
    return found


def circles(edges: dict[str, set[str]]) -> list[str]:
    """Modules that need each other while being imported, as `a → b → a`."""
    done: set[str] = set()

    def visit(module: str, trail: list[str]) -> list[str]:
        if module in trail:
            return [" → ".join([*trail[trail.index(module) :], module])]
        if module in done:
            return []
        found = [c for target in sorted(edges[module]) for c in visit(target, [*trail, module])]
        done.add(module)
        return found

    return [circle for module in sorted(edges) for circle in visit(module, [])]


MODULES = sources(ROOT)


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module: str) -> None:
    path = MODULES[module]
    found = faults(module, path.read_text(), set(MODULES), path.name == "__init__.py")
    assert not found, "\n".join(found)


def test_no_circles() -> None:
    edges = {}
    for module, path in MODULES.items():
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        found = imports(path.read_text(), package, set(MODULES))
        edges[module] = {i.module for i in found if not i.lazy and i.module in MODULES}
        edges[module].discard(module)
    assert not circles(edges)


@pytest.mark.parametrize("module", ["fastlora", "fastlora.cli"])
def test_optional_packages_are_not_imported(module: str) -> None:
    code = f"import sys, {module}; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    loaded = {name.split(".")[0] for name in run.stdout.split()}
    assert "torch" in loaded
    assert not loaded & {"triton", "peft", "transformers", "accelerate", "rich", "matplotlib"}


def test_kernels_is_no_package() -> None:
    """A kernels/__init__.py would shadow Hugging Face's `kernels` for transformers."""
    assert not list(ROOT.glob("kernels/**/__init__.py"))


RULES = {
    "fastlora.ops": {
        "from fastlora import dispatch": None,
        "from . import dispatch, reference": None,
        "import torch, math": None,
        "def f():\n    import triton, fastlora.kernels.philox": None,
        "if TYPE_CHECKING:\n    from .modules import FastLoRALinear": None,
        "from fastlora import modules": "fastlora.modules, which is above",
        "def f():\n    from . import functional": "fastlora.functional, which is above",
        "import fastlora": "fastlora, which is above",
        "try:\n    import triton\nexcept ImportError:\n    triton = None": "imports triton",
        "if True:\n    import peft": "imports peft",
        "class A:\n    import tqdm": "imports tqdm",
    },
    "fastlora.integrations.peft": {
        "import peft, transformers": None,
        "from ..modules import FastLoRALinear": None,
        "from ..cli import main": "fastlora.cli, which is above",
    },
    "fastlora.kernels.philox": {
        "import triton.language as tl": None,
        "from .tuning.gemm import CONFIGS": None,
        "from ..dropout import seed": "fastlora.dropout, which is above",
        "def f():\n    import peft": "imports peft",
    },
}


@pytest.mark.parametrize("module, source", [(m, s) for m, rules in RULES.items() for s in rules])
def test_the_rules_themselves(module: str, source: str) -> None:
    modules = {"fastlora", *(f"fastlora.{name}" for name in LEVEL), "fastlora.kernels.tuning.gemm"}
    found = faults(module, source, modules)
    expected = RULES[module][source]
    assert found == [] if expected is None else expected in "\n".join(found)


def test_a_circle_is_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b → c → b"]
    assert not circles({"a": {"b", "c"}, "b": {"c"}, "c": set()})


def test_a_new_module_is_named() -> None:
    with pytest.raises(AssertionError, match="fastlora/surprise is new: add it to LAYERS"):
        faults("fastlora.surprise", "", set())
