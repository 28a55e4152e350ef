"""``PreparedAdd``: ``multi_lora_add_`` for adapters that stay where they are, with little Python.

What does not change between calls is checked at the first one and kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastlora.backends.cpu.prepared import BoundSlices
from fastlora.backends.in_place import copy_if_shared, share_memory
from fastlora.functional.checks import multi as checks
from fastlora.functional.multi import multi_lora_add_
from fastlora.functional.row_groups import RowGroups
from fastlora.functional.rows import is_tracked
from fastlora.ops import call as ops
from fastlora.ops import dispatch


class PreparedAdd:
    """Adds each row's adapter part to y in place, for slices of columns with adapters of their own.

    - lora_A: of each slice (S, R, K)
    - lora_B: of each slice (S, N, R); in y their columns lie side by side
    - scalings float32 (S,)
    - ranks: of each slice int32 (S,), or None for all R

    All are kept as they are: what is written to them counts from the next call on, and memory that
    moved is found. Same numbers as ``multi_lora_add_``, slice by slice. Not differentiable: call
    under no_grad. Raises TypeError or ValueError naming the argument, at the first call for what
    does not fit y and x.
    """

    def __init__(
        self,
        lora_A: Sequence[Tensor],
        lora_B: Sequence[Tensor],
        scalings: Tensor,
        ranks: Sequence[Tensor | None] | None = None,
    ) -> None:
        self.lora_A, self.lora_B, self.scalings = tuple(lora_A), tuple(lora_B), scalings
        self.ranks = (None,) * len(self.lora_A) if ranks is None else tuple(ranks)
        lengths = len(self.lora_A), len(self.lora_B), len(self.ranks)
        if len(set(lengths)) > 1 or not lengths[0]:
            raise ValueError(
                "lora_A: expected as many slices as lora_B and ranks have, and at least one, got "
                f"{lengths[0]}, {lengths[1]} and {lengths[2]}"
            )
        # Of a native call: what y and x were like, and the bound operands.
        self._kind: tuple[torch.dtype, int, int] | None = None
        self._bound: BoundSlices | None = None

    def __call__(self, y: Tensor, x: Tensor, groups: RowGroups) -> Tensor:
        """Adds to y (T, N of all slices) for x (T, K) and T grouped rows; returns y."""
        bound = self._bound
        if bound is None or torch.compiler.is_compiling() or not self._fits(y, x, groups):
            return self._add_checked(y, x, groups)
        if not groups.nobody:
            bound.add_(y, x, groups.order, groups.starts)
        return y

    def _fits(self, y: Tensor, x: Tensor, groups: RowGroups) -> bool:
        """Whether a call is as the one that was checked, but for its rows."""
        T = x.shape[0]
        return (
            (y.dtype, y.shape[-1], x.shape[-1]) == self._kind
            and x.dtype == y.dtype
            and y.dim() == x.dim() == 2
            and y.shape[0] == T
            and groups.shape == (T,)
            and groups.num_slots == self.scalings.shape[0]
            and y.stride(1) == x.stride(1) == 1
            and (y.stride(0) >= y.shape[1] or T < 2)
            and type(y) is type(x) is Tensor
            and y.device == x.device == groups.order.device
            and not share_memory(x, y)
            and dispatch.asked() is None
            and not torch.is_grad_enabled()
            and not ops.is_watched()
        )

    def _add_checked(self, y: Tensor, x: Tensor, groups: RowGroups) -> Tensor:
        """The same by ``multi_lora_add_``; binds the operands where the CPU kernels take them."""
        if is_tracked(y, x, *self.lora_A, *self.lora_B):
            raise ValueError("y: a prepared call is not differentiable, call under torch.no_grad()")
        width = sum(B.shape[1] for B in self.lora_B)
        if y.shape[-1] != width:
            raise ValueError(f"y: expected {width} columns, those of all slices, got {y.shape[-1]}")
        for columns, A, B, ranks in self._slices():
            checks.added(y[..., columns], x, A, B, self.scalings, ranks, None, None)
        before = x if len(self.lora_A) == 1 else copy_if_shared(x, y)
        for columns, A, B, ranks in self._slices():
            multi_lora_add_(y[..., columns], before, A, B, groups, self.scalings, ranks=ranks)
        A = self.lora_A[0]
        backend = dispatch.choose("multi_lora_add_", x.device, x.dtype, A.dtype, A.shape[1])
        if backend == "cpu" and dispatch.asked() is None and self._can_bind():
            self._kind = y.dtype, width, x.shape[-1]
            self._bound = BoundSlices(self.lora_A, self.lora_B, self.scalings, self.ranks)
        return y

    def _slices(self) -> Iterator[tuple[slice, Tensor, Tensor, Tensor | None]]:
        end = 0
        for A, B, ranks in zip(self.lora_A, self.lora_B, self.ranks, strict=True):
            begin, end = end, end + B.shape[1]
            yield slice(begin, end), A, B, ranks

    def _can_bind(self) -> bool:
        factors = (*self.lora_A, *self.lora_B)
        return (
            all(t.stride(2) == 1 for t in factors)
            and len({(t.dtype, *t.shape) for t in self.lora_A}) == 1
            and self.scalings.is_contiguous()
            and all(t is None or (t.dtype == torch.int32 and t.is_contiguous()) for t in self.ranks)
        )
