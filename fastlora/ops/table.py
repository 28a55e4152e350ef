"""The ops of ``torch.ops.fastlora``, a record each; everything else about them follows from it.

The ops are raw: no argument checks, no autograd (``fastlora.functional`` has both), matrices only.
The last argument of each is the backend that ``fastlora.ops.dispatch`` chose. In-place ops return
nothing and name exactly what they write; ``merge_`` and ``swap_`` return receipts, whose size
depends on the data. No argument has a default, so implementations always receive all of them, by
position.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from fastlora.ops import fakes, flops
from fastlora.ops.availability import BACKENDS


class Op(NamedTuple):
    """One op, all that is known of it."""

    name: str
    operands: str  # in the schema's language, without `invariant` and `backend`
    result: str
    fake: Callable[..., Any]
    flops: Callable[..., int]
    kind: str  # "linear" of one adapter, "multi" and "packed" of many, "rows", "merge"
    independent_rows: bool = False  # takes `invariant`: whether a row has its bits in any batch
    backward: str | None = None  # the op of its gradients
    mapped: bool = True  # whether torch.vmap maps over it
    backends: tuple[str, ...] = BACKENDS  # those that have it, best first

    @property
    def schema(self) -> str:
        invariant = ", bool invariant" if self.independent_rows else ""
        return f"{self.name}({self.operands}{invariant}, str backend) -> {self.result}"

    @property
    def names(self) -> list[str]:
        """The operands' names, in their order."""
        return [operand.split()[-1] for operand in self.operands.split(", ")]

    @property
    def in_place(self) -> bool:
        return self.name.endswith("_")


_ADAPTER = "Tensor lora_A, Tensor lora_B"
_DROPOUT = "float scaling, float dropout_p, Tensor? seed"
_ROWS = (
    "Tensor ids, Tensor order, Tensor starts, Tensor scalings, Tensor? ranks, Tensor? row_scales"
)
_PACKED = "Tensor? table, int[] ends"
# counts[i] adapters belong to weight i; a receipt is four tensors a weight.
_ADAPTERS = "Tensor[] lora_A, Tensor[] lora_B, float[] scalings, int[] counts"
_OLD_ADAPTERS = "Tensor[] old_A, Tensor[] old_B, float[] old_scalings, int[] old_counts"
# Positions, bits, counts and checksums of all weights, and how many of each a weight has.
_RECEIPTS = "(Tensor, Tensor, Tensor, Tensor, Tensor)"
_NOT_CUDA = tuple(name for name in BACKENDS if name != "cuda")

_RECORDS = (
    Op(
        "lora_linear",
        f"Tensor x, Tensor weight, Tensor? bias, {_ADAPTER}, Tensor? lora_bias, {_DROPOUT}",
        "(Tensor, Tensor)",
        fakes.linear,
        flops.linear,
        kind="linear",
        independent_rows=True,
        backward="lora_linear_backward",
    ),
    Op(
        "lora_add_",
        f"Tensor(a!) y, Tensor(b!) h, Tensor x, {_ADAPTER}, Tensor? lora_bias, {_DROPOUT}",
        "()",
        fakes.in_place,
        flops.add,
        kind="linear",
        independent_rows=True,
        backward="lora_linear_backward",
        backends=_NOT_CUDA,
    ),
    Op(
        "lora_linear_backward",
        f"Tensor dy, Tensor x, Tensor? weight, {_ADAPTER}, Tensor h, {_DROPOUT}, bool[] needs",
        "Tensor[]",
        fakes.linear_backward,
        flops.backward,
        kind="linear",
    ),
    Op(
        "group_rows",
        "Tensor ids, int num_slots",
        "(Tensor, Tensor, Tensor)",
        fakes.group_rows,
        flops.none,
        kind="rows",
        backends=("cpu", "torch"),
    ),
    Op(
        "multi_lora_linear",
        f"Tensor x, Tensor weight, Tensor? bias, {_ADAPTER}, {_ROWS}",
        "(Tensor, Tensor)",
        fakes.linear,
        flops.linear,
        kind="multi",
        independent_rows=True,
        backward="multi_lora_linear_backward",
    ),
    Op(
        "multi_lora_add_",
        f"Tensor(a!) y, Tensor(b!) h, Tensor x, {_ADAPTER}, {_ROWS}",
        "()",
        fakes.in_place,
        flops.add,
        kind="multi",
        independent_rows=True,
        backward="multi_lora_linear_backward",
    ),
    Op(
        "multi_lora_linear_backward",
        f"Tensor dy, Tensor x, Tensor? weight, {_ADAPTER}, Tensor h, {_ROWS}, bool[] needs",
        "Tensor[]",
        fakes.multi_linear_backward,
        flops.backward,
        kind="multi",
        backends=_NOT_CUDA,
    ),
    Op(
        "packed_lora_linear",
        f"Tensor x, Tensor weight, Tensor? bias, {_ADAPTER}, {_PACKED}, {_ROWS}",
        "Tensor",
        fakes.packed_linear,
        flops.packed_linear,
        kind="packed",
        independent_rows=True,
        mapped=False,
    ),
    Op(
        "packed_lora_add_",
        f"Tensor(a!) y, Tensor x, {_ADAPTER}, {_PACKED}, {_ROWS}",
        "()",
        fakes.in_place,
        flops.packed_add,
        kind="packed",
        independent_rows=True,
        mapped=False,
    ),
    Op(
        "merge_",
        f"Tensor(a!)[] weights, {_ADAPTERS}, bool receipt",
        _RECEIPTS,
        fakes.merge,
        flops.merge,
        kind="merge",
        mapped=False,
    ),
    Op(
        "unmerge_",
        f"Tensor(a!)[] weights, {_ADAPTERS}, Tensor[] receipts",
        "()",
        fakes.in_place,
        flops.merge,
        kind="merge",
        mapped=False,
    ),
    Op(
        "swap_",
        f"Tensor(a!)[] weights, {_OLD_ADAPTERS}, Tensor[] receipts, {_ADAPTERS}",
        _RECEIPTS,
        fakes.merge,
        flops.swap,
        kind="merge",
        mapped=False,
    ),
)
OPS = {op.name: op for op in _RECORDS}
