"""Exact results in float64: ``oracle`` a token at a time, ``compute_gradients`` of many at once.

``oracle`` is tests/support/oracle.py, loaded by its path, as some other package ``tests`` may be
installed.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from benchmarks import ROOT

__all__ = ["compute_gradients", "oracle"]


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmarks.oracle", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"cannot load {path}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


oracle = _load(ROOT / "tests" / "support" / "oracle.py")


def compute_gradients(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    mask: Tensor | None,
    columns: Tensor,
    outs: Tensor,
) -> dict[str, Tensor]:
    """Computes gradients of ``(lora_linear * dy).sum()``: dx, dA of ``columns``, dB of ``outs``.

    mask: float64 (M, K), what dropout multiplied x by. As products, on the operands' device: for
    8192 rows the oracle's loop takes minutes. tests/benchmarks/test_gate.py holds it to the oracle.
    """
    dy, x, weight, lora_A, lora_B = (t.detach() for t in (dy, x, weight, lora_A, lora_B))
    dy, A, B = dy.double(), lora_A.double(), lora_B.double()
    factor = x.new_ones((), dtype=torch.float64) if mask is None else mask
    up, down = dy @ B, (x.double() * factor) @ A.T  # [M, R] both
    some = factor if mask is None else factor[:, columns]
    dx = dy @ weight[:, columns].double() + scaling * some * (up @ A[:, columns])
    results = {
        "dx": dx,
        "dA": scaling * up.T @ (x[:, columns].double() * some),
        "dB": scaling * dy[:, outs].T @ down,
    }
    return {name: t.cpu() for name, t in results.items()}
