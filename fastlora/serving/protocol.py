"""What the engine needs of a server: its files import this, and the server imports the engine."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from torch import nn

from fastlora.rows.watch import Watch
from fastlora.serving.bank.bank import AdapterBank

# The adapter name that, like None, means the base model.
BASE = "__base__"


class Server(Protocol):
    """A model whose rows can each have their own adapter, such as ``MultiLoRAModel``."""

    @property
    def model(self) -> nn.Module:
        """The model; it is called within ``running``."""
        ...

    @property
    def bank(self) -> AdapterBank:
        """The adapters, which are leased for as long as a batch uses them."""
        ...

    @property
    def rows(self) -> Watch:
        """What knows which rows of the batch a layer sees."""
        ...

    def follow(self) -> None:
        """Takes the bank to where the model's layers are now."""
        ...

    def running(
        self,
        slots: Sequence[int],
        scales: Sequence[float] | None = None,
        *,
        per_token: bool = False,
    ) -> AbstractContextManager[None]:
        """Within, this thread's batch has row i in ``slots[i]`` of the bank."""
        ...
