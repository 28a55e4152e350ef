"""``Settings``: how much a server lets callers ask for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """Limits of a server.

    - name: of the base model in requests
    - hosts: names that a Host header may have, without the port
    - body_bytes, body_seconds: of a request's body, and how long it may take to come
    - prompt_tokens: of a prompt; None: what the engine holds
    - choices, logprobs, stops, stop_length: of a request's fields
    - under_way, under_way_per_key: answers that run or wait, n of a request counting n times
    - seconds: that an answer may take, waiting included
    - grace: seconds that running answers have after the signal to stop
    - adapter_bytes: of an adapter's weights
    """

    name: str
    hosts: frozenset[str] = frozenset({"localhost", "127.0.0.1", "::1"})
    body_bytes: int = 1 << 20
    body_seconds: float = 30.0
    prompt_tokens: int | None = None
    choices: int = 8
    logprobs: int = 20
    stops: int = 4
    stop_length: int = 256
    under_way: int = 256
    under_way_per_key: int = 64
    seconds: float = 600.0
    grace: float = 30.0
    adapter_bytes: int = 1 << 30
