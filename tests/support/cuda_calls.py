"""Calls of the CUDA kernels' own functions."""

from __future__ import annotations

from typing import Any

from fastlora.backends import cuda


def call_kernel(op: str, *operands: Any, path: str | None = None) -> Any:
    """Runs an op's function on operands that it must not refuse."""
    reason = cuda.refuses(op, operands, path=path)
    assert reason is None, f"refused: {reason}"
    return getattr(cuda, op)(*operands, path=path)
