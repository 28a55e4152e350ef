"""All that streaming asks of the server: adapters lent for a while, and whose tokens are whose."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from fastlora.serving.entry import Lease

if TYPE_CHECKING:
    from fastlora.serving.model import MultiLoRAModel


def lend(server: MultiLoRAModel, name: str | None) -> Future[Lease]:
    """The adapter, now or when it has been read; an empty lease for the base model.

    Raises ValueError for a name that is not loaded.
    """
    server.follow()
    return server.bank.lease([] if name in (None, "__base__") else [name])


def routed(
    server: MultiLoRAModel, slots: Sequence[int], scales: Sequence[float]
) -> AbstractContextManager[None]:
    """Within, this thread's flat batch has token i in ``slots[i]``, times ``scales[i]``."""
    return server.running(
        slots, scales if any(scale != 1 for scale in scales) else None, per_token=True
    )
