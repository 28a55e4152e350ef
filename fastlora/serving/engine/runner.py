"""One step of the running batch: all tokens that are due, of all requests, in one forward."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fastlora.inspection.wrappers import unwrap
from fastlora.modules.shared_weight import SharedWeight
from fastlora.serving.attention_hook import attending
from fastlora.serving.engine.attention import Piece, Step
from fastlora.serving.engine.cache import RowCache
from fastlora.serving.engine.server import routed

if TYPE_CHECKING:
    from fastlora.serving.model import MultiLoRAModel


class Chunk(NamedTuple):
    """The next tokens of a row: from position ``start`` on, through an adapter's slot.

    last: whether the token that follows is wanted.
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

    def __init__(self, server: MultiLoRAModel, cache: RowCache, followed: bool = False) -> None:
        self.server, self.cache, self._followed = server, cache, followed
        self.device = device_of(server)
        model: Any = unwrap(server.model)
        # Of a head with adapters every token is a row of the batch, and must come to it.
        self._keeps = "logits_to_keep" in inspect.signature(model.forward).parameters and not (
            isinstance(model.get_output_embeddings(), SharedWeight)
        )

    def step(self, chunks: Sequence[Chunk]) -> Tensor:
        """Logits (n, V) that follow the n chunks with ``last``, which come in the given order.

        Chunks of one token come first, in the order of their rows.
        """
        singles = next((i for i, c in enumerate(chunks) if len(c.tokens) > 1), len(chunks))
        pieces = [Piece(c.row, c.start, c.start + len(c.tokens)) for c in chunks]
        step = Step(self.cache, pieces, singles, self.device)
        ids = torch.tensor([[t for c in chunks for t in c.tokens]], device=self.device)
        slots = [c.slot for c in chunks for _ in c.tokens]
        scales = [c.scale for c in chunks for _ in c.tokens]
        ends = torch.tensor([len(c.tokens) for c in chunks]).cumsum(0) - 1
        wanted = ends[torch.tensor([c.last for c in chunks])].to(self.device)
        # Of no token would mean of all.
        kept = wanted if len(wanted) else wanted.new_zeros(1)
        options: dict[str, Any] = {"logits_to_keep": kept} if self._keeps else {}
        rows = routed(self.server, slots, scales, ids if self._followed else None)
        with torch.no_grad(), attending(step), rows:
            logits = self.server.model(
                input_ids=ids,
                position_ids=step.positions[None].to(self.device),
                # Four dimensions are taken as a finished mask, and left alone.
                attention_mask=torch.zeros(1, 1, 1, 1, device=self.device),
                use_cache=False,
                **options,
            ).logits[0]
        return logits[: len(wanted)] if self._keeps else logits[wanted.to(logits.device)]


def device_of(server: MultiLoRAModel) -> torch.device:
    """Where token ids go."""
    model: Any = unwrap(server.model)
    return model.get_input_embeddings().weight.device
