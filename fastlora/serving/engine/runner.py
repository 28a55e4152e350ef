"""``Runner``: one step of the running batch, all tokens that are due in one forward."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlora.inspection.wrappers import unwrap
from fastlora.modules.shared_weight import SharedWeight
from fastlora.serving.engine.attention import Piece, Step
from fastlora.serving.engine.attention_hook import attend_with
from fastlora.serving.engine.cache import RowCache
from fastlora.serving.engine.server import route_tokens
from fastlora.serving.protocol import Server


class Chunk(NamedTuple):
    """The next tokens of a row: from position ``start`` on, through an adapter's slot.

    last: whether the token that follows is asked for.
    """

    row: int
    start: int
    tokens: Sequence[int]
    slot: int = -1
    scale: float = 1.0
    last: bool = True


class Runner:
    """Runs chunks through a server's model; keys and values stay in ``cache``.

    followed: whether each layer must be shown to see the tokens in their order.
    """

    def __init__(self, server: Server, cache: RowCache, followed: bool = False) -> None:
        self.server, self.cache, self._followed = server, cache, followed
        self.device = device_of(server)
        model: Any = unwrap(server.model)
        # A head with adapters must get every token, since each is a row of the batch.
        self._picks = "logits_to_keep" in inspect.signature(model.forward).parameters and not (
            isinstance(model.get_output_embeddings(), SharedWeight)
        )

    def step(self, chunks: Sequence[Chunk]) -> Tensor:
        """Runs a forward; returns logits (n, V) after the n chunks with ``last``, in their order.

        Chunks of one token come first, in the order of their rows.
        """
        singles = next((i for i, c in enumerate(chunks) if len(c.tokens) > 1), len(chunks))
        pieces = [Piece(c.row, c.start, c.start + len(c.tokens)) for c in chunks]
        step = Step(self.cache, pieces, singles, self.device)
        ids = torch.tensor([[t for c in chunks for t in c.tokens]], device=self.device)
        slots = [c.slot for c in chunks for _ in c.tokens]
        scales = [c.scale for c in chunks for _ in c.tokens]
        ends = torch.tensor([len(c.tokens) for c in chunks]).cumsum(0) - 1
        picked = ends[torch.tensor([c.last for c in chunks])].to(self.device)
        # No token at all would mean every token.
        keep = picked if len(picked) else picked.new_zeros(1)
        options: dict[str, Any] = {"logits_to_keep": keep} if self._picks else {}
        rows = route_tokens(self.server, slots, scales, ids if self._followed else None)
        with torch.no_grad(), attend_with(step), rows:
            logits = self.server.model(
                input_ids=ids,
                position_ids=step.positions[None].to(self.device),
                # The model takes four dimensions as a finished mask and does not change it.
                attention_mask=torch.zeros(1, 1, 1, 1, device=self.device),
                use_cache=False,
                **options,
            ).logits[0]
        return logits[: len(picked)] if self._picks else logits[picked.to(logits.device)]


def device_of(server: Server) -> torch.device:
    """Returns the device that token ids go to."""
    model: Any = unwrap(server.model)
    return model.get_input_embeddings().weight.device
