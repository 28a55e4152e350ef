"""``oracle``: tests/oracle.py, by its path, as anybody may have installed a package ``tests``."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

from benchmarks import ROOT

__all__ = ["oracle"]


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmarks.oracle", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"cannot load {path}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


oracle = _load(ROOT / "tests" / "oracle.py")
