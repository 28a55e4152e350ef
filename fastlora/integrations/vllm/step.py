"""Which rows have which adapter in one step of vLLM's: grouped once, read by every layer."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from fastlora.functional.row_groups import RowGroups, group_rows


class Step:
    """A batch's tokens, and the requests whose next token is asked for, each with a slot.

    tokens (T,), requests (B,): slots in [-1, num_slots), -1 for no adapter.
    """

    def __init__(self, tokens: Tensor, requests: Tensor, num_slots: int) -> None:
        self.num_slots = num_slots
        # vLLM writes these tensors for its next step.
        self._tokens, self._requests = tokens.clone(), requests.clone()
        self.tokens, self.requests = self._group(self._tokens), self._group(self._requests)
        # Of the last prompt whose log-probabilities were asked for.
        self._part: tuple[int, int, RowGroups] | None = None
        ends = self.tokens.starts + self.requests.starts
        self.slots: list[int] = (ends[1:] > ends[:-1]).nonzero().flatten().tolist()

    def _group(self, ids: Tensor) -> RowGroups:
        groups = group_rows(ids, self.num_slots)
        nobody = int(groups.starts[0]) == ids.numel()
        return RowGroups(*groups.tensors, groups.num_slots, groups.shape, nobody)

    def rows_of_logits(self, x: Tensor) -> RowGroups:
        """The rows that logits are asked for: of every request, or a part of the batch's tokens.

        The latter where log-probabilities of a prompt are wanted: vLLM then asks for consecutive
        rows of the hidden states and says nothing else about them, so x's place in its memory must
        tell. Raises RuntimeError where it does not: nobody's rows may get another one's adapter.
        """
        T, K = x.shape
        if x.numel() == 0 or x.is_contiguous() and x.untyped_storage().nbytes() == x.nbytes:
            if T == self._requests.numel():
                return self.requests
        stored = x.untyped_storage().nbytes() // (K * x.itemsize)
        first, rest = divmod(x.storage_offset(), K)
        tokens = self._tokens.numel()
        if not x.is_contiguous() or rest or stored != tokens or first + T > tokens:
            raise RuntimeError(
                f"logits of {T} rows: cannot tell whose they are among {tokens} tokens of "
                f"{self._requests.numel()} requests; FASTLORA_VLLM=0 runs vLLM's own LoRA"
            )
        if self._part is None or self._part[:2] != (first, T):
            self._part = first, T, self._group(self._tokens[first : first + T])
        return self._part[2]


def find_changed(before: Iterable[int | None], now: Iterable[int | None]) -> list[int]:
    """Slots whose adapter is another one now, of the adapters' numbers by slot."""
    before, now = list(before), list(now)
    longest = max(len(before), len(now))
    before += [None] * (longest - len(before))
    now += [None] * (longest - len(now))
    return [s for s, (old, new) in enumerate(zip(before, now, strict=True)) if old != new]


def identity_of(R: int, like: Tensor, num_slots: int) -> Tensor:
    """A (num_slots, R, R) identity for each slot, of the dtype and on the device of ``like``."""
    eye = torch.eye(R, dtype=like.dtype, device=like.device)
    return eye.expand(num_slots, R, R)
