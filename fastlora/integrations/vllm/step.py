"""Which rows have which adapter in one step of vLLM's: found once, read by every layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import zip_longest
from typing import Protocol

import torch
from torch import Tensor

from fastlora.functional.row_groups import RowGroups, group_rows


class Step(Protocol):
    """A batch's tokens, and its requests, whose next token is asked for; each has a slot or -1.

    nobody: none of them has an adapter, and nothing is to be done. slots: those that some have, or
    None where the device alone knows them.
    """

    nobody: bool
    slots: list[int] | None

    def rows_of_tokens(self, count: int) -> RowGroups:
        """Returns the adapters of the batch's rows, ``count`` with what pads them."""
        ...

    def rows_of_logits(self, x: Tensor) -> RowGroups:
        """Returns the adapters of the rows x (T, K) that logits are asked for.

        Raises RuntimeError where it cannot be told whose they are.
        """
        ...


# From slots of tokens (T,) and of requests (B,), in [-1, number of slots).
MakeStep = Callable[[Tensor, Tensor, int], Step]


class HostStep:
    """On the CPU: the rows sorted by adapter."""

    def __init__(self, tokens: Tensor, requests: Tensor, num_slots: int) -> None:
        self._num_slots = num_slots
        # Copies: vLLM writes these tensors for its next step.
        self._tokens, self._requests = tokens.clone(), requests.clone()
        self._of_tokens = self._group(self._tokens)
        self._of_requests = self._group(self._requests)
        self.nobody = self._of_tokens.nobody and self._of_requests.nobody
        ends = self._of_tokens.starts + self._of_requests.starts
        self.slots: list[int] | None = (ends[1:] > ends[:-1]).nonzero().flatten().tolist()
        # Of the last prompt whose log-probabilities were asked for.
        self._part: tuple[int, int, RowGroups] | None = None

    def _group(self, ids: Tensor) -> RowGroups:
        groups = group_rows(ids, self._num_slots)
        nobody = int(groups.starts[0]) == ids.numel()
        return RowGroups(*groups.tensors, groups.num_slots, groups.shape, nobody)

    def rows_of_tokens(self, count: int) -> RowGroups:
        return self._of_tokens

    def rows_of_logits(self, x: Tensor) -> RowGroups:
        tokens = self._tokens.numel()
        first = find_first_token(x, tokens, self._requests.numel(), tokens)
        if first is None:
            return self._of_requests
        T = x.shape[0]
        if self._part is None or self._part[:2] != (first, T):
            self._part = first, T, self._group(self._tokens[first : first + T])
        return self._part[2]


class DeviceSteps:
    """On a GPU: slots in memory that stays, since a captured graph reads it again when it runs.

    Rows are in their own order, padded by rows without an adapter: a graph is captured for a
    number of rows, and the order by adapter would be another one for each. Calling it starts a
    step, of at most max_tokens rows.
    """

    slots: list[int] | None

    def __init__(self, max_tokens: int, device: torch.device) -> None:
        self.nobody, self.slots = True, None
        self._order = torch.arange(max_tokens, device=device)
        self._tokens = torch.full((max_tokens,), -1, dtype=torch.int32, device=device)
        self._requests = self._tokens.clone()
        self._counts, self._num_slots = (0, 0), 0

    def __call__(self, tokens: Tensor, requests: Tensor, num_slots: int) -> DeviceSteps:
        for kept, given in ((self._tokens, tokens), (self._requests, requests)):
            kept[: given.numel()] = given
            kept[given.numel() :] = -1
        self._counts, self._num_slots = (tokens.numel(), requests.numel()), num_slots
        # Known on the device alone; a graph is captured whether anybody has an adapter or not.
        self.nobody = False
        return self

    def rows_of_tokens(self, count: int) -> RowGroups:
        return self._rows(self._tokens[:count])

    def rows_of_logits(self, x: Tensor) -> RowGroups:
        first = find_first_token(x, *self._counts, self._tokens.numel())
        ids = self._requests if first is None else self._tokens[first:]
        return self._rows(ids[: x.shape[0]])

    def _rows(self, ids: Tensor) -> RowGroups:
        T, S = ids.numel(), self._num_slots
        # Where slots start is for the backends of the CPU; the kernels find them in ids.
        starts = self._order[: S + 1]
        return RowGroups(ids, self._order[:T], starts, S, (T,))


def find_first_token(x: Tensor, tokens: int, requests: int, stored_at_most: int) -> int | None:
    """Where the rows x (T, K) begin among the batch's tokens; None: they are those of the requests.

    vLLM asks for logits of its requests' last tokens, gathered into new memory, or, for a prompt's
    log-probabilities, of consecutive rows of the hidden states, and does not say which: x's place
    in its memory tells. There are hidden states of ``tokens`` rows and perhaps more that pad them.
    Raises RuntimeError where it is neither: no row may get another one's adapter.
    """
    T, K = x.shape
    whole = x.is_contiguous() and x.untyped_storage().nbytes() == x.nbytes
    if x.numel() == 0 or (whole and requests == T):
        return None
    stored = x.untyped_storage().nbytes() // (K * x.itemsize)
    first, rest = divmod(int(x.storage_offset()), K)
    fits = first + T <= tokens <= stored <= stored_at_most
    if not x.is_contiguous() or rest or not fits:
        raise RuntimeError(
            f"logits of {T} rows: cannot tell whose they are among {tokens} tokens of {requests} "
            "requests; FASTLORA_VLLM=0 runs vLLM's own LoRA"
        )
    return first


def find_changed(before: Iterable[int | None], now: Iterable[int | None]) -> list[int]:
    """Slots whose adapter is another one now, of the adapters' numbers by slot."""
    pairs = zip_longest(before, now)
    return [s for s, (old, new) in enumerate(pairs) if old != new]
