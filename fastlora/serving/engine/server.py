"""All that streaming asks of the server: adapters lent for a while, and whose tokens are whose."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import Tensor

from fastlora.serving.bank.entry import Lease

if TYPE_CHECKING:
    from fastlora.serving.model import MultiLoRAModel


def lend(server: MultiLoRAModel, name: str | None) -> Future[Lease]:
    """The adapter, now or when it has been read; an empty lease for the base model.

    Raises ValueError for a name that is not loaded.
    """
    server.follow()
    return server.bank.lease([] if name in (None, "__base__") else [name])


@contextmanager
def routed(
    server: MultiLoRAModel,
    slots: Sequence[int],
    scales: Sequence[float],
    ids: Tensor | None = None,
) -> Iterator[None]:
    """Within, this thread's flat batch has token i in ``slots[i]``, times ``scales[i]``.

    ids: (1, T), of a call whose layers must be shown to see the tokens in this order.
    """
    scaled = scales if any(scale != 1 for scale in scales) else None
    with server.running(slots, scaled, per_token=True):
        if ids is None:
            yield
        else:
            with server.rows.follow_tokens(ids):
                yield
