"""How the engine uses a server: it leases adapters and says which token has which."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager

from torch import Tensor

from fastlora.serving.bank.lease import Lease
from fastlora.serving.protocol import BASE, Server


def lease_adapter(server: Server, name: str | None) -> Future[Lease]:
    """Leases the adapter, now or when it has been read; for the base model the lease is empty.

    Raises ValueError for a name that is not loaded.
    """
    server.follow()
    return server.bank.lease([] if name in (None, BASE) else [name])


@contextmanager
def route_tokens(
    server: Server,
    slots: Sequence[int],
    scales: Sequence[float],
    ids: Tensor | None = None,
) -> Iterator[None]:
    """Within, this thread's flat batch has token i in ``slots[i]``, times ``scales[i]``.

    ids: (1, T); then every layer must be seen to get the tokens in this order.
    """
    scaled = scales if any(scale != 1 for scale in scales) else None
    with server.running(slots, scaled, per_token=True):
        if ids is None:
            yield
        else:
            with server.rows.follow_tokens(ids):
                yield
