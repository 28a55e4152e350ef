"""Defines the ops of the table in torch: schema, implementation, fake, vmap rule, FLOPs.

torch's module of flop counters imports triton, so it is not imported here: ``register_flops`` does
its work once somebody else has imported it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import library
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from fastlora.ops.run import IMPLEMENTATIONS
from fastlora.ops.table import OPS, Op

_COUNTER = "torch.utils.flop_counter"
_flops_registered = False


def _without_gradients(run: Callable[..., Any]) -> Callable[..., Any]:
    """For programs that call a raw op while gradients are on: what it is made of has none."""

    def kernel(*args: Any) -> Any:
        if not torch.is_grad_enabled():
            return run(*args)
        with torch.no_grad():
            return run(*args)

    return kernel


def _vmap_rule(record: Op) -> Callable[..., Any]:
    """One call for each element of the batch: right for any mix of batched and shared operands."""

    def rule(info: Any, in_dims: Sequence[int | None], *args: Any) -> Any:
        op = getattr(torch.ops.fastlora, record.name)
        if record.in_place and (in_dims[0] is None or in_dims[1] is None):
            raise RuntimeError(f"vmap: {record.name} needs both y and h batched, which it writes")
        in_dims = (*in_dims, *(None,) * (len(args) - len(in_dims)))
        pairs = list(zip(args, in_dims, strict=True))
        # The dims of a list argument are a list, of None here.
        results = [
            op(*(a.select(d, i) if isinstance(d, int) else a for a, d in pairs))
            for i in range(info.batch_size)
        ]
        if record.in_place:
            return None, None
        stacked = [torch.stack(parts) for parts in zip(*results, strict=True)]
        kind = list if isinstance(results[0], list) else tuple
        return kind(stacked), kind([0] * len(stacked))

    return rule


def register_flops() -> None:
    """Gives torch's counters the formulas, those that count already too."""
    global _flops_registered
    counter = sys.modules.get(_COUNTER)
    if _flops_registered or counter is None or not hasattr(counter, "FlopCounterMode"):
        return
    _flops_registered = True
    packets = {getattr(torch.ops.fastlora, op.name): op.flops for op in OPS.values()}
    for packet, formula in packets.items():
        counter.register_flop_formula(packet)(formula)
    modes: Any = _get_current_dispatch_mode_stack()
    for mode in modes:
        if type(mode).__name__ == "_FlopCounterMode":
            for packet in packets:
                mode.counter.flop_registry[packet] = counter.flop_registry[packet]


_library = library.Library("fastlora", "DEF")
for _op in OPS.values():
    _library.define(_op.schema)
    _kernel = _without_gradients(IMPLEMENTATIONS[_op.name])
    _library.impl(_op.name, _kernel, "CompositeExplicitAutograd")
    library.register_fake(f"fastlora::{_op.name}", _op.fake, lib=_library)
    if _op.mapped:
        library.register_vmap(f"fastlora::{_op.name}", _vmap_rule(_op), lib=_library)
register_flops()
