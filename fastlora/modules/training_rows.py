"""The rows of a batch in training: which adapter each belongs to."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fastlora.config.listing import list_some
from fastlora.modules.routing import Routing
from fastlora.rows.statements import Statement


class TrainingRows(Routing):
    """Which adapter each training row belongs to. Only adapters in the batch get a slot.

    One thread uses it at a time; its backward runs in other threads, which must see it too.
    """

    watched = recomputes = True

    def __init__(self, adapters: Sequence[str]) -> None:
        super().__init__("run the model, and its backward, within fastlora.use_adapters")
        self.adapters = tuple(adapters)
        self.present: tuple[int, ...] = ()
        # The layers that ran in this block; the block's thread, while there is one.
        self.ran: set[int] = set()
        self.owner: int | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy of the model runs no batch.
        return TrainingRows, (self.adapters,)

    @contextmanager
    def run_named(
        self,
        adapter_names: Sequence[str | None],
        share_present: Callable[[list[bool]], list[bool]] = list,
        stated: Mapping[int, Statement] | None = None,
    ) -> Iterator[None]:
        """Runs a block in which row i of the batch trains ``adapter_names[i]``, or none.

        share_present: turns flags of adapters with rows here into those with rows in any process.
        stated: the owners of modules' rows, by the modules' ids.
        """
        rows = [-1 if name is None else self.index(name) for name in adapter_names]
        if self.owner not in (None, threading.get_ident()):
            raise RuntimeError("use_adapters: another thread is in such a block of this model")
        before = self.present, self.ran, self.owner
        ran: set[int] = set()
        present = share_present([i in rows for i in range(len(self.adapters))])
        self.present, self.ran = tuple(i for i, is_present in enumerate(present) if is_present), ran
        self.owner = threading.get_ident()
        slot_of = {row: i for i, row in enumerate(self.present)}
        try:
            slots = [slot_of.get(row, -1) for row in rows]
            with self.run_batch(slots, len(slot_of), stated=stated):
                yield
                if self.ran is not ran:
                    raise RuntimeError("use_adapters: its blocks were left in another order")
        finally:
            self.present, self.ran, self.owner = before

    def check(self, layer: nn.Module) -> None:
        """Refuses a layer that runs again, in a backward, in a block that is not its forward's."""
        if torch.compiler.is_compiling() or self.slots is None:
            return
        if torch._C._current_graph_task_id() == -1:
            self.ran.add(id(layer))
        elif id(layer) not in self.ran:
            raise RuntimeError(f"these are not the rows of its forward: {self.outside}")

    def index(self, name: object) -> int:
        """Finds where ``name`` stands among the adapters; ValueError where it does not."""
        if name not in self.adapters:
            known = list_some(self.adapters, 8)
            raise ValueError(f"adapter_names: expected one of {known}, got {name!r}")
        return self.adapters.index(str(name))
