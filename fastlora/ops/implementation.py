"""What runs behind each op, on the backend that its last argument names."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch

from fastlora.ops import dispatch
from fastlora.ops.table import OPS, Op


def _implement(op: Op) -> Callable[..., Any]:
    name, has_invariant = op.name, op.independent_rows

    def run(*args: Any) -> Any:
        *operands, backend = args
        options = {"invariant": operands.pop()} if has_invariant else {}
        function = dispatch.implementation(name, backend)
        if torch._C._is_any_autocast_enabled():
            first = operands[0][0] if isinstance(operands[0], list) else operands[0]
            device = first.device.type
            # The caller has cast what autocast wants cast; inside, dtypes are as written.
            with torch.autocast(device, enabled=False):
                return function(*operands, **options)
        return function(*operands, **options)

    def run_as_written(*args: Any) -> Any:
        # After a graph break torch.compile compiles the frames in here too, and would contract
        # what must be exact. Without it loaded, asking it not to would load it: seconds.
        loaded = "torch._dynamo" in sys.modules
        return torch.compiler.disable(run)(*args) if loaded else run(*args)

    return run_as_written if op.kind == "merge" else run


IMPLEMENTATIONS = {op.name: _implement(op) for op in OPS.values()}
