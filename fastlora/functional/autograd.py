"""The autograd rules of the ops, one Function each; backward runs on its forward's backend.

Written with ``setup_context`` so that torch.func and torch.compile see through them. Gradients that
nobody asked for are not computed. Backward is itself not differentiable: trying raises.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from fastlora.functional.rows import as_rows, copy_rows_back
from fastlora.ops.call import call


class _Gradients(Function):
    """A backward op whose own derivative is not known: whoever asks for it is told so.

    ``once_differentiable`` would not do: torch.func gets silent zeros from it.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(op: str, *args: Any) -> tuple[Tensor, ...]:
        return tuple(call(op, *args))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        raise RuntimeError("fastlora: LoRA ops are differentiable once, not twice")


def _gradients(op: str, needs: tuple[bool, ...], *args: Any) -> tuple[Tensor | None, ...]:
    """The op's gradients at the places that asked for one."""
    if not any(needs):
        return (None,) * len(needs)
    # A compiled graph refuses double backward by itself.
    twice = torch.is_grad_enabled() and not torch.compiler.is_compiling()
    grads = iter(_Gradients.apply(op, *args) if twice else call(op, *args))
    return tuple(next(grads) if need else None for need in needs)


def _vmap_in_place(function: type[Function], info: Any, in_dims: Any, *args: Any) -> Any:
    """One call for each element of the batch, onto its view of y: torch generates no such rule."""
    if in_dims[0] is None:
        raise RuntimeError("vmap: y is written in place, so it must be batched where others are")
    for i in range(info.batch_size):
        pairs = zip(args, in_dims, strict=True)
        y, h, *others = (a.select(d, i) if isinstance(d, int) else a for a, d in pairs)
        # Saved for a gradient of each call; the h that came with them may be saved for another's.
        own = torch.empty_like(h)
        function.apply(y, own, *others)
        h.copy_(own)
    return args[0], in_dims[0]


class LoRALinear(Function):
    """One adapter's linear.

    (x, weight, bias, lora_A, lora_B, lora_bias, scaling, p, seed, invariant, backend) -> (y, h).
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        return call("lora_linear", *args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, weight, _, lora_A, lora_B, _, *ctx.scalars, seed, _, ctx.backend = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, lora_A, lora_B, output[1], seed)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        dy, _ = grad_outputs
        if dy is None:
            return (None,) * len(ctx.needs_input_grad)
        *saved, seed = ctx.saved_tensors
        needs = ctx.needs_input_grad[:6]
        grads = _gradients(
            "lora_linear_backward", needs,
            dy, *saved, *ctx.scalars, seed, needs, ctx.backend,
        )  # fmt: skip
        return (*grads, *(None,) * 5)


class LoRAAdd(Function):
    """(y, h, x, lora_A, lora_B, scaling, p, seed, invariant, backend) -> y; y and h are written."""

    @staticmethod
    def forward(*args: Any) -> Tensor:
        y, h, x, lora_A, lora_B, *rest = args
        rows = as_rows(y)
        call("lora_add_", rows, h, x, lora_A, lora_B, None, *rest)
        return copy_rows_back(y, rows)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        y, h, x, lora_A, lora_B, *ctx.scalars, seed, _, ctx.backend = inputs
        ctx.mark_dirty(y)
        ctx.save_for_backward(x, lora_A, lora_B, h, seed)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        (dy,) = grad_outputs
        x, lora_A, lora_B, h, seed = ctx.saved_tensors
        need_y, _, need_x, need_A, need_B = ctx.needs_input_grad[:5]
        needs = (need_x, False, False, need_A, need_B, False)
        dx, _, _, dA, dB, _ = _gradients(
            "lora_linear_backward", needs,
            as_rows(dy), x, None, lora_A, lora_B, h, *ctx.scalars, seed, needs, ctx.backend,
        )  # fmt: skip
        return (dy if need_y else None, None, dx, dA, dB, *(None,) * 5)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return _vmap_in_place(LoRAAdd, info, in_dims, *args)


class MultiLoRALinear(Function):
    """(x, weight, bias, lora_A, lora_B, the rows' six, invariant, backend) -> (y, h).

    The six say which adapter a row has: ids, order, starts, scalings, ranks, row_scales.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        return call("multi_lora_linear", *args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, weight, _, lora_A, lora_B, *routing, _, ctx.backend = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, lora_A, lora_B, output[1], *routing)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        dy, _ = grad_outputs
        if dy is None:
            return (None,) * len(ctx.needs_input_grad)
        needs = ctx.needs_input_grad[:5]
        grads = _gradients(
            "multi_lora_linear_backward", needs, dy, *ctx.saved_tensors, needs, ctx.backend
        )
        return (*grads, *(None,) * 8)


class MultiLoRAAdd(Function):
    """(y, h, x, lora_A, lora_B, the rows' six, invariant, backend) -> y; y and h are written."""

    @staticmethod
    def forward(*args: Any) -> Tensor:
        y, *rest = args
        rows = as_rows(y)
        call("multi_lora_add_", rows, *rest)
        return copy_rows_back(y, rows)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        y, h, x, lora_A, lora_B, *routing, _, ctx.backend = inputs
        ctx.mark_dirty(y)
        ctx.save_for_backward(x, lora_A, lora_B, h, *routing)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        (dy,) = grad_outputs
        x, lora_A, lora_B, h, *routing = ctx.saved_tensors
        need_y, _, need_x, need_A, need_B = ctx.needs_input_grad[:5]
        needs = (need_x, False, False, need_A, need_B)
        dx, _, _, dA, dB = _gradients(
            "multi_lora_linear_backward", needs,
            as_rows(dy), x, None, lora_A, lora_B, h, *routing, needs, ctx.backend,
        )  # fmt: skip
        return (dy if need_y else None, None, dx, dA, dB, *(None,) * 8)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return _vmap_in_place(MultiLoRAAdd, info, in_dims, *args)
