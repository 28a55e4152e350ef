"""The one list of ops: ``torch.ops.fastlora.*``, their schemas, fakes and vmap rules.

The ops are raw: no argument checks, no autograd (``fastlora.functional`` has both), matrices only.
The last argument of each is the backend that ``fastlora.ops.dispatch`` chose. In-place ops return
nothing and name exactly what they write; ``merge_`` and ``swap_`` return receipts, whose size
depends on the data. No argument has a default, so implementations always receive all of them, by
position.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, library
from torch.nn import Parameter

from fastlora.backends.dtypes import BITS
from fastlora.backends.values import Adapters, Rows
from fastlora.inspection.plain import unreadable
from fastlora.ops import dispatch, flops
from fastlora.ops.invariance import unmarked

_ADAPTER = "Tensor lora_A, Tensor lora_B"
_DROPOUT = "float scaling, float dropout_p, Tensor? seed"
_GROUPS = (
    "Tensor ids, Tensor order, Tensor starts, Tensor scalings, Tensor? ranks, Tensor? row_scales"
)
_PACKED = "Tensor? table, int[] ends"
# Of each weight so many adapters as counts says; four tensors of each weight's receipt.
_LIST = "Tensor[] lora_A, Tensor[] lora_B, float[] scalings, int[] counts"
# Positions, bits, counts and checksums of all weights, and how many are whose.
_RECEIPTS = "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
_OLD = "Tensor[] old_A, Tensor[] old_B, float[] old_scalings, int[] old_counts"

# Those that give each row of x a row of y, and may be asked to do so whatever the others are.
_ROWS = (
    "lora_linear",
    "lora_add_",
    "multi_lora_linear",
    "multi_lora_add_",
    "packed_lora_linear",
    "packed_lora_add_",
)
# Those that nothing differentiates or maps over.
_ALONE = ("packed_lora_linear", "packed_lora_add_", "merge_", "unmerge_", "swap_")

SCHEMAS = {
    "lora_linear": f"(Tensor x, Tensor weight, Tensor? bias, {_ADAPTER}, Tensor? lora_bias, "
    f"{_DROPOUT}, str backend) -> (Tensor, Tensor)",
    "lora_add_": f"(Tensor(a!) y, Tensor(b!) h, Tensor x, {_ADAPTER}, Tensor? lora_bias, "
    f"{_DROPOUT}, str backend) -> ()",
    "lora_linear_backward": f"(Tensor dy, Tensor x, Tensor? weight, {_ADAPTER}, Tensor h, "
    f"{_DROPOUT}, bool[] needs, str backend) -> Tensor[]",
    "group_rows": "(Tensor ids, int num_slots, str backend) -> (Tensor, Tensor, Tensor)",
    "multi_lora_linear": f"(Tensor x, Tensor weight, Tensor? bias, {_ADAPTER}, {_GROUPS}, "
    "str backend) -> (Tensor, Tensor)",
    "multi_lora_add_": f"(Tensor(a!) y, Tensor(b!) h, Tensor x, {_ADAPTER}, {_GROUPS}, "
    "str backend) -> ()",
    "multi_lora_linear_backward": f"(Tensor dy, Tensor x, Tensor? weight, {_ADAPTER}, Tensor h, "
    f"{_GROUPS}, bool[] needs, str backend) -> Tensor[]",
    "packed_lora_linear": f"(Tensor x, Tensor weight, Tensor? bias, {_ADAPTER}, {_PACKED}, "
    f"{_GROUPS}, str backend) -> Tensor",
    "packed_lora_add_": f"(Tensor(a!) y, Tensor x, {_ADAPTER}, {_PACKED}, {_GROUPS}, "
    "str backend) -> ()",
    "merge_": f"(Tensor(a!)[] weights, {_LIST}, bool receipt, str backend) {_RECEIPTS}",
    "unmerge_": f"(Tensor(a!)[] weights, {_LIST}, Tensor[] receipts, str backend) -> ()",
    "swap_": f"(Tensor(a!)[] weights, {_OLD}, Tensor[] receipts, {_LIST}, str backend) {_RECEIPTS}",
}


def _fake_lora_linear(x: Tensor, weight: Tensor, bias: Any, lora_A: Tensor, *_: Any) -> Any:
    M = x.shape[0]
    return x.new_empty(M, weight.shape[0]), x.new_empty(M, lora_A.shape[-2])


def _fake_backward(widths: Callable[..., list[Tensor]]) -> Callable[..., list[Tensor]]:
    def fake(*args: Any) -> list[Tensor]:
        *rest, needs, _backend = args
        return [grad for grad, need in zip(widths(*rest), needs, strict=True) if need]

    return fake


def _linear_gradients(
    dy: Tensor, x: Tensor, weight: Tensor | None, lora_A: Tensor, lora_B: Tensor, *_: Any
) -> list[Tensor]:
    N = dy.shape[1]
    return [
        x.new_empty(x.shape),
        dy.new_empty(N, x.shape[1]),
        dy.new_empty(N),
        lora_A.new_empty(lora_A.shape),
        lora_B.new_empty(lora_B.shape),
        lora_B.new_empty(N),
    ]


def _multi_gradients(*args: Any) -> list[Tensor]:
    return _linear_gradients(*args)[:5]


def _fake_group_rows(ids: Tensor, num_slots: int, _backend: str) -> tuple[Tensor, Tensor, Tensor]:
    order = ids.new_empty(ids.shape, dtype=torch.int64)
    return (
        ids.new_empty(ids.shape, dtype=torch.int32),
        order,
        order.new_empty(num_slots + 1),
    )


def _fake_merge_(weights: Sequence[Tensor], *_: Any) -> tuple[Tensor, ...]:
    context, weight = library.get_ctx(), weights[0]
    changed, tiles, sums = (context.new_dynamic_size() for _ in range(3))
    return (
        weight.new_empty(changed, dtype=torch.int16),
        weight.new_empty(changed, dtype=BITS[weight.itemsize]),
        torch.empty(tiles, dtype=torch.int32, device="cpu"),
        weight.new_empty(sums, dtype=torch.int64),
        torch.empty(len(weights), 3, dtype=torch.int64, device="cpu"),
    )


def _fake_in_place(*_: Any) -> None:
    return None


FAKES: dict[str, Callable[..., Any]] = {
    "lora_linear": _fake_lora_linear,
    "lora_add_": _fake_in_place,
    "lora_linear_backward": _fake_backward(_linear_gradients),
    "group_rows": _fake_group_rows,
    "multi_lora_linear": _fake_lora_linear,
    "multi_lora_add_": _fake_in_place,
    "multi_lora_linear_backward": _fake_backward(_multi_gradients),
    "packed_lora_linear": lambda x, weight, *_: x.new_empty(x.shape[0], weight.shape[0]),
    "packed_lora_add_": _fake_in_place,
    "merge_": _fake_merge_,
    "unmerge_": _fake_in_place,
    "swap_": _fake_merge_,
}


# Where the adapters' operands begin in the ops of many adapters; the six of the rows follow them,
# in backward h between the two.
_ADAPTERS_AT = {
    "multi_lora_linear": 3,
    "multi_lora_add_": 3,
    "multi_lora_linear_backward": 3,
    "packed_lora_linear": 3,
    "packed_lora_add_": 2,
}


def pack(name: str, operands: Sequence[Any]) -> Sequence[Any]:
    """An op's flat operands as backends take them: one ``Adapters``, one ``Rows``."""
    at = _ADAPTERS_AT.get(name)
    if at is None:
        return operands
    if name == "multi_lora_linear_backward":
        dy, x, weight, lora_A, lora_B, h, *rows, needs = operands
        return dy, x, weight, Adapters(lora_A, lora_B), h, Rows(*rows), needs
    return *operands[:at], Adapters(*operands[at:-6]), Rows._make(operands[-6:])


def _implementation(name: str) -> Callable[..., Any]:
    packs = name in _ADAPTERS_AT

    def run(*args: Any) -> Any:
        *operands, backend = args
        backend, invariant = unmarked(backend)
        how = {"invariant": True} if invariant and name in _ROWS else {}
        function = dispatch.implementation(name, backend)
        operands = pack(name, operands) if packs else operands
        if torch._C._is_any_autocast_enabled():
            first = operands[0][0] if isinstance(operands[0], list) else operands[0]
            device = first.device.type
            # The caller has cast what autocast wants cast; inside, dtypes are as written.
            with torch.autocast(device, enabled=False):
                return function(*operands, **how)
        return function(*operands, **how)

    def run_as_written(*args: Any) -> Any:
        # After a graph break torch.compile compiles the frames in here too, and would contract
        # what must be exact. Without it loaded, asking it not to would load it: seconds.
        loaded = "torch._dynamo" in sys.modules
        return torch.compiler.disable(run)(*args) if loaded else run(*args)

    return run_as_written if name in ("merge_", "unmerge_", "swap_") else run


def _without_gradients(run: Callable[..., Any]) -> Callable[..., Any]:
    """For programs that call a raw op while gradients are on: what it is made of has none."""

    def kernel(*args: Any) -> Any:
        if not torch.is_grad_enabled():
            return run(*args)
        with torch.no_grad():
            return run(*args)

    return kernel


def _vmap_rule(name: str) -> Callable[..., Any]:
    """One call for each element of the batch: right for any mix of batched and shared operands."""

    def rule(info: Any, in_dims: Sequence[int | None], *args: Any) -> Any:
        op = getattr(torch.ops.fastlora, name)
        if name.endswith("_") and (in_dims[0] is None or in_dims[1] is None):
            raise RuntimeError(f"vmap: {name} needs both y and h batched, which it writes")
        in_dims = (*in_dims, *(None,) * (len(args) - len(in_dims)))
        pairs = list(zip(args, in_dims, strict=True))
        # The dims of a list argument are a list, of None here.
        results = [
            op(*(a.select(d, i) if isinstance(d, int) else a for a, d in pairs))
            for i in range(info.batch_size)
        ]
        if name.endswith("_"):
            return None, None
        stacked = [torch.stack(parts) for parts in zip(*results, strict=True)]
        kind = list if isinstance(results[0], list) else tuple
        return kind(stacked), kind([0] * len(stacked))

    return rule


def call(name: str, *args: Any) -> Any:
    """``torch.ops.fastlora.<name>(*args)`` on operands that autograd does not track.

    Straight to the implementation where nothing on the way would look: torch's dispatcher and its
    way back into Python cost a small layer a tenth of its time on a CPU.
    """
    if torch.compiler.is_compiling():
        return getattr(torch.ops.fastlora, name)(*args)
    plain = _are_plain(args)
    if not plain:
        _refuse_sharded(name, args)
    if _watched() or not plain:
        flops.register()
        try:
            return getattr(torch.ops.fastlora, name)(*args)
        except (NotImplementedError, TypeError) as error:
            _name_unreadable(name, args, error)
            raise
    return _implementations[name](*args)


def _watched() -> bool:
    """Whether a transform, a mode, a tracer or a profiler sees the ops that run."""
    return bool(
        torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._is_tracing()
        or torch.autograd._profiler_enabled()  # pyright: ignore[reportPrivateImportUsage]
    )


def _are_plain(values: Sequence[Any]) -> bool:
    """Whether operands are what they seem: no subclass, nothing still to be done, and there."""
    for value in values:
        kind = type(value)
        if kind is Tensor or kind is Parameter:
            if value.is_neg() or value.is_meta or value._is_zerotensor():
                return False
        elif kind not in _VALUES:
            return False
    return True


def _refuse_sharded(name: str, args: Sequence[Any]) -> None:
    """TypeError for a DTensor: where its parts lie, and what is a sum, is for layers to say."""
    if "torch.distributed.tensor" not in sys.modules:
        return
    for argument, part in _operands(name, args):
        if hasattr(part, "placements"):
            raise TypeError(
                f"{argument}: expected a tensor that this process holds whole, got a DTensor: "
                "a layer under parallelize_module takes one, or give all operands' to_local()"
            )


def _name_unreadable(name: str, args: Sequence[Any], error: Exception) -> None:
    """TypeError for an operand, as a quantized weight, whose class does not know the op."""
    for argument, part in _operands(name, args):
        found = unreadable(part) if isinstance(part, Tensor) else None
        if found is not None:
            raise TypeError(f"{argument}: expected a plain tensor, got {found}") from error


def _operands(name: str, args: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    """(argument's name, value), of a list each of its own."""
    schema = getattr(torch.ops.fastlora, name).default._schema
    for argument, value in zip(schema.arguments, args, strict=True):
        for part in value if isinstance(value, list | tuple) else (value,):
            yield argument.name, part


# A tuple is of bools: which gradients are wanted.
_VALUES = {type(None), float, int, bool, str, tuple}

_library = library.Library("fastlora", "DEF")
_implementations = {name: _implementation(name) for name in SCHEMAS}
for _name, _schema in SCHEMAS.items():
    _library.define(_name + _schema)
    _kernel = _without_gradients(_implementations[_name])
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")
    library.register_fake(f"fastlora::{_name}", FAKES[_name], lib=_library)
    if _name not in _ALONE:
        library.register_vmap(f"fastlora::{_name}", _vmap_rule(_name), lib=_library)
flops.register()
