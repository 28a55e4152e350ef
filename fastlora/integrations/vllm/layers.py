"""vLLM's LoRA layers by fastlora's ops, on vLLM's own tensors as they lie.

A slice of a layer has A (S, 1, R, K) and B (S, 1, N, R), R the engine's max_lora_rank: what an
adapter of a lower rank leaves is zeros. vLLM does not hand its rank on, so it is read from A, again
where vLLM has written a slot. Scaling is in B already.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fastlora.functional.prepared import PreparedAdd
from fastlora.functional.row_groups import RowGroups
from fastlora.integrations.vllm.step import HostStep, MakeStep, Step, find_changed
from fastlora.ops import call as ops
from fastlora.ops import dispatch


class Layer:
    """One layer's adapters: the prepared call, and the ranks in use of each slice.

    A (S, 1, R, K), or None where only B is applied; B (S, 1, N, R). counts: whether ranks are read,
    else all R count.
    """

    def __init__(
        self, A: Sequence[Tensor] | None, B: Sequence[Tensor], scale: float, counts: bool
    ) -> None:
        self.tensors = (*(A or ()), *B)
        self.pointers = [t.data_ptr() for t in self.tensors]
        self.scale = scale
        slots = B[0].shape[0]
        self.lora_B = tuple(b[:, 0] for b in B)
        if A is None:
            self.lora_A = tuple(_identity_of(b.shape[2], b, slots) for b in self.lora_B)
            self.ranks: tuple[Tensor, ...] | None = None
            ranks = None
        else:
            self.lora_A = tuple(a[:, 0] for a in A)
            ranks = tuple(torch.zeros(slots, dtype=torch.int32) for _ in A)
            # What is written to a tensor of inference mode is not counted.
            ranks = ranks if counts and not any(a.is_inference() for a in A) else None
            self.ranks = ranks
        scalings = torch.full((slots,), scale, device=B[0].device)
        self.prepared = PreparedAdd(self.lora_A, self.lora_B, scalings, ranks)
        self._versions = [-1] * len(self.lora_A)
        self._known: dict[int, int] = {}
        self._step: Step | None = None

    def fits(self, tensors: Sequence[Tensor], scale: float) -> bool:
        """Whether it was made for these tensors, which lie where they lay."""
        return self.scale == scale and [t.data_ptr() for t in tensors] == self.pointers

    def follow(self, step: Step, writes: Sequence[int]) -> None:
        """Reads the ranks of the step's slots where they may have changed.

        writes: how often each slot has got another adapter.
        """
        if self.ranks is None or step.slots is None:
            return
        versions = [a._version for a in self.tensors[: len(self.lora_A)]]
        if versions != self._versions:
            self._known.clear()
        elif step is self._step:
            return
        stale = [s for s in step.slots if self._known.get(s) != writes[s]]
        for A, ranks in zip(self.lora_A, self.ranks, strict=True):
            for slot in stale:
                ranks[slot] = count_ranks(A[slot])
        self._known.update((s, writes[s]) for s in stale)
        self._versions, self._step = versions, step


def count_ranks(A: Tensor) -> int:
    """The number of rows of A (R, K) up to the last that is not all zeros."""
    bits = A
    if A.is_contiguous() and A.shape[1] * A.itemsize % 8 == 0 and A.data_ptr() % 8 == 0:
        bits = A.view(torch.int64)  # three times as fast to look through
    used = bits.any(-1).nonzero()
    return int(used[-1]) + 1 if len(used) else 0


def _identity_of(R: int, like: Tensor, num_slots: int) -> Tensor:
    """A (num_slots, R, R) identity for each slot, of the dtype and on the device of ``like``."""
    eye = torch.eye(R, dtype=like.dtype, device=like.device)
    return eye.expand(num_slots, R, R)


class Layers:
    """The layers of one model, and the step that runs."""

    def __init__(self, make_step: MakeStep = HostStep) -> None:
        self._make_step = make_step
        self.step: Step | None = None
        self._layers: dict[int, Layer] = {}
        self._adapters: list[int | None] = []
        self._writes: list[int] = []

    def begin(self, tokens: Tensor, requests: Tensor, adapters: Iterable[int | None]) -> None:
        """Starts a step: slots of its tokens and requests, and which adapter each slot has."""
        adapters = list(adapters)
        self._writes += [0] * (len(adapters) - len(self._writes))
        for slot in find_changed(self._adapters, adapters):
            self._writes[slot] += 1
        self._adapters = adapters
        self.step = self._make_step(tokens, requests, len(adapters))

    def add_linear(
        self, y: Tensor, x: Tensor, A: Sequence[Tensor], B: Sequence[Tensor], scale: float
    ) -> None:
        """Adds scale * (x A^T) B^T to y (T, all slices' N), slice by slice, for x (T, K)."""
        if self.step is not None and not self.step.nobody:
            self._add(y, x, A, B, scale, self.step.rows_of_tokens(x.shape[0]))

    def add_logits(self, y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float) -> None:
        """The same for the logits y (T, N): whose rows they are, ``Step`` tells.

        y may be of a wider dtype than x, and wider than B by columns of padding.
        """
        step = self.step
        if step is None or step.nobody:
            return
        groups = step.rows_of_logits(x)
        if groups.nobody:
            return
        columns = y[:, : B.shape[2]]
        part = columns if y.dtype == x.dtype else torch.zeros_like(columns, dtype=x.dtype)
        self._add(part, x, (A,), (B,), scale, groups)
        if part is not columns:
            columns += part

    def add_expanded(
        self,
        y: Tensor,
        hs: Sequence[Tensor],
        B: Sequence[Tensor],
        first: int = 0,
        add: bool = True,
    ) -> None:
        """Adds h B^T to y's columns from ``first`` on, h (T, R) and B (S, 1, N, R) a slice.

        add: otherwise it takes the place of what is there.
        """
        step = self.step
        if not add:
            y[:, first : first + sum(b.shape[2] for b in B)] = 0
        if step is None or step.nobody:
            return
        for h, b in zip(hs, B, strict=True):
            columns = y[:, first : first + b.shape[2]]
            self._add(columns, h.to(y.dtype), None, (b,), 1.0, step.rows_of_tokens(h.shape[0]))
            first += b.shape[2]

    def add_shrunk(
        self, hs: Sequence[Tensor], x: Tensor, A: Sequence[Tensor], scale: float
    ) -> None:
        """Adds scale * x A^T to each slice's h (T, R), float32, for x (T, K)."""
        step = self.step
        if step is None or step.nobody:
            return
        groups = step.rows_of_tokens(x.shape[0])
        for h, stacked in zip(hs, A, strict=True):
            lora_A = stacked[:, 0]
            S, R, _ = lora_A.shape
            backend = dispatch.choose("multi_lora_add_", x.device, x.dtype, lora_A.dtype, R)
            part, nothing = x.new_empty(x.shape[0], R), lora_A.new_empty(S, 0, R)
            rows = (*groups.tensors, torch.ones(S, device=x.device), None, None)
            y = x.new_empty(x.shape[0], 0)
            ops.call("multi_lora_add_", y, part, x, lora_A, nothing, *rows, False, backend)
            with_adapter = groups.ids.ge(0)[:, None]
            h += torch.where(with_adapter, part, 0).to(h.dtype) * scale

    def _add(
        self,
        y: Tensor,
        x: Tensor,
        A: Sequence[Tensor] | None,
        B: Sequence[Tensor],
        scale: float,
        groups: RowGroups,
    ) -> None:
        step = self.step
        assert step is not None
        tensors = (*(A or ()), *B)
        key = B[0].data_ptr()
        layer = self._layers.get(key)
        if layer is None or not layer.fits(tensors, scale):
            layer = self._layers[key] = Layer(A, B, scale, step.slots is not None)
        layer.follow(step, self._writes)
        layer.prepared(y, x, groups)
