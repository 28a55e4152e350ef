"""A LoRA linear of DTensors: tensor parallelism, computed on what each process holds.

Along each dimension of the mesh the weight (N, K) says how the layer is split: Shard(0) gives each
process columns of y, Shard(1) columns of x (column- and row-parallel in Shoeybi et al.,
"Megatron-LM", 2019), Replicate leaves it whole, and x may be split along its batch. Every operand
is brought to the placement that this asks for. Where processes hold parts of a sum it is added up:
y's by its reader, gradients' at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import Function

from fastlora import functional as F
from fastlora.backends import dropout
from fastlora.functional.autograd import LoRALinear
from fastlora.functional.checks import linear as checks
from fastlora.functional.rows import as_rows, kind_of
from fastlora.modules.dtensors import is_dtensor
from fastlora.ops import dispatch, invariance

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Placement

    Split = Mapping[str, tuple[Placement, Placement]]


def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    *,
    bias: Tensor | None = None,
    lora_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    training: bool = False,
) -> Tensor:
    """Computes ``functional.lora_linear``, also of operands that are all DTensors.

    Returns a DTensor (..., N) then: Shard(-1) where the weight is Shard(0), Partial where it is
    Shard(1), otherwise as x is. Gradients are placed as what they are of. Processes with the same
    part of x draw the same dropout mask, those with another one a mask of their own; so a split x
    has not the mask that it would have whole.

    Raises TypeError naming the operand that is no DTensor, ValueError for one on another mesh or a
    weight that is placed otherwise.
    """
    if not is_dtensor(weight):
        return F.lora_linear(
            x, weight, lora_A, lora_B, scaling,
            bias=bias, lora_bias=lora_bias, dropout_p=dropout_p, training=training,
        )  # fmt: skip
    for name, value in {"x": x, "bias": bias, "lora_A": lora_A, "lora_B": lora_B,
                        "lora_bias": lora_bias}.items():  # fmt: skip
        _check_beside(weight, name, value)
    x, weight, bias = checks.autocast(x, weight, bias)
    checks.linear(x, weight, lora_A, lora_B, bias, lora_bias)
    scaling, dropout_p = checks.scaling(scaling), checks.dropout(dropout_p)
    mesh: DeviceMesh = weight.device_mesh  # pyright: ignore[reportAttributeAccessIssue]
    splits = _list_splits(x, weight)
    shape = (*x.shape[:-1], weight.shape[0])

    def local(name: str, value: Tensor | None) -> Any:
        return None if value is None else _ToLocal.apply(value, *_list_placements(splits, name))

    x, weight = local("x", x), local("weight", weight)
    lora_A, lora_B = local("lora_A", lora_A), local("lora_B", lora_B)
    bias, lora_bias = (_add_once(local("bias", b), splits, mesh) for b in (bias, lora_bias))
    drops = training and dropout.threshold(dropout_p) > 0
    p, seed = (dropout_p, _draw_seed(x.device, splits, mesh)) if drops else (0.0, None)
    invariant, backend = invariance.asked(), dispatch.choose("lora_linear", *kind_of(x, lora_A))
    operands = (as_rows(x), weight, bias, lora_A, lora_B, lora_bias, scaling, p, seed)
    y, _ = LoRALinear.apply(*operands, invariant, backend)
    y = y.view(*x.shape[:-1], y.shape[1])
    return _ToWhole.apply(y, mesh, torch.Size(shape), *_list_placements(splits, "y"))


def _check_beside(weight: Any, name: str, value: object) -> None:
    if value is None:
        return
    if not is_dtensor(value):
        raise TypeError(
            f"{name}: expected a DTensor beside a weight that is sharded over processes, got "
            f"{type(value).__name__}: parallelize_module places a layer's input and parameters, "
            "fully_shard gathers parameters in the forward of the module it was called on"
        )
    mesh = getattr(value, "device_mesh", None)
    if mesh != weight.device_mesh:
        raise ValueError(f"{name}: expected the weight's mesh {weight.device_mesh}, got {mesh}")


def _list_splits(x: Any, weight: Any) -> list[Split]:
    """Lists for each mesh dimension {operand: (its placement, that of its gradient)}."""
    last = x.dim() - 1
    return [
        _split(of_x, of_weight, last)
        for of_x, of_weight in zip(x.placements, weight.placements, strict=True)
    ]


def _split(x: Placement, weight: Placement, last: int) -> Split:
    from torch.distributed.tensor import Partial, Replicate, Shard

    whole, part = Replicate(), Partial()
    if type(weight) is Shard and weight.dim == 0:
        rows = (Shard(0), Shard(0))
        kinds = {"x": (whole, part), "lora_A": (whole, part), "y": (Shard(last), Shard(last))}
        return kinds | dict.fromkeys(("weight", "lora_B", "bias"), rows)
    if type(weight) is Shard:
        # dB is linear in h, so that each process's share of it is that of its own share of h.
        columns, sums = (Shard(1), Shard(1)), (whole, part)
        kinds = {"x": (Shard(last), Shard(last)), "y": (part, whole)}
        return kinds | {"weight": columns, "lora_A": columns, "lora_B": sums, "bias": sums}
    if not isinstance(weight, Replicate):
        raise ValueError(f"weight: expected Shard or Replicate placements, got {weight}")
    batch = type(x) is Shard and x.dim != last
    rows = (x, x) if batch else (whole, whole)
    others = (whole, part if batch else whole)
    return {"x": rows, "y": rows} | dict.fromkeys(("weight", "lora_A", "lora_B", "bias"), others)


def _list_placements(splits: list[Split], name: str) -> tuple[list[Placement], list[Placement]]:
    """Lists an operand's placements, and its gradient's as each process will compute it."""
    return [split[name][0] for split in splits], [split[name][1] for split in splits]


def _add_once(bias: Tensor | None, splits: list[Split], mesh: DeviceMesh) -> Tensor | None:
    """Keeps the bias in the first process alone where y is a sum over processes; zero elsewhere."""
    coordinate = mesh.get_coordinate() or ()
    summed = (split["y"][0].is_partial() for split in splits)
    if bias is None or not any(at and part for at, part in zip(coordinate, summed, strict=True)):
        return bias
    # By a choice, not a product: gradients must flow in every process, or one waits for ever.
    return bias.where(torch.zeros((), dtype=torch.bool, device=bias.device), 0)


def _draw_seed(device: torch.device, splits: list[Split], mesh: DeviceMesh) -> Tensor:
    """Draws the first process's seed, and another for each part of x; Philox takes any as a key."""
    from torch.distributed.tensor import Replicate, distribute_tensor

    drawn = distribute_tensor(dropout.new_seed(device), mesh, [Replicate()] * mesh.ndim)
    part = 0
    for i, at in enumerate(mesh.get_coordinate() or ()):
        if not splits[i]["x"][0].is_replicate():
            part = part * mesh.size(i) + at
    return drawn.to_local() + part


class _ToLocal(Function):
    """(DTensor, placements, its gradient's placements) -> what this process then holds of it."""

    @staticmethod
    def forward(ctx: Any, whole: Any, placements: Any, gradients: Any) -> Tensor:
        ctx.whole, ctx.gradients = (whole.device_mesh, whole.placements, whole.shape), gradients
        local = whole.redistribute(placements=placements).to_local()
        return local.view_as(local)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        from torch.distributed.tensor import Replicate

        mesh, before, shape = ctx.whole
        grad = _make_dtensor(grads[0], mesh, ctx.gradients, shape)
        # The gradient of a sum's part is the sum's.
        placements = [Replicate() if p.is_partial() else p for p in before]
        return grad.redistribute(placements=placements), None, None


class _ToWhole(Function):
    """(local tensor, mesh, the whole's shape, placements, its gradient's placements) -> DTensor."""

    @staticmethod
    def forward(
        ctx: Any, local: Tensor, mesh: Any, shape: torch.Size, placements: Any, gradients: Any
    ) -> Tensor:
        ctx.gradients = gradients
        return _make_dtensor(local, mesh, placements, shape)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        local = grads[0].redistribute(placements=ctx.gradients).to_local()
        return local, None, None, None, None


def _make_dtensor(local: Tensor, mesh: Any, placements: Any, shape: torch.Size) -> Any:
    """Makes a DTensor of shards that may be unequal: the whole's shape says what they are of."""
    from torch.distributed.tensor import DTensor

    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=shape, stride=stride)
