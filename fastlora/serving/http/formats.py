"""OpenAI's JSON of answers: of completions and of chats, whole and in pieces."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

from fastlora.serving.engine.request import Event
from fastlora.serving.http.choices import Piece


class CompletionFormat:
    """Completions. show: the text of one token. asked: whether log-probabilities are."""

    prefix, kind, piece_kind = "cmpl", "text_completion", "text_completion"

    def __init__(self, show: Callable[[int], str], asked: bool) -> None:
        self._show, self._asked = show, asked
        self._offsets: dict[int, int] = {}

    def begin(self, index: int) -> dict[str, Any] | None:
        """Makes the choice that a stream begins with."""
        return None

    def make_piece(self, index: int, piece: Piece) -> dict[str, Any]:
        """Makes a choice of a stream."""
        return self.make_choice(index, piece)

    def make_choice(self, index: int, piece: Piece) -> dict[str, Any]:
        """Makes a whole choice."""
        return {
            "index": index,
            "text": piece.text,
            "token_ids": [event.token for event in piece.events],
            "logprobs": self._list_logprobs(index, piece.events) if self._asked else None,
            "finish_reason": piece.finish,
        }

    def _list_logprobs(self, index: int, events: Sequence[Event]) -> dict[str, Any]:
        texts = [self._show(event.token or 0) for event in events]
        at, offsets = self._offsets.get(index, 0), []
        for text in texts:
            offsets.append(at)
            at += len(text)
        self._offsets[index] = at
        return {
            "tokens": texts,
            "token_logprobs": [event.logprob for event in events],
            # Parts of characters look alike: the likeliest is to be seen.
            "top_logprobs": [
                {self._show(token): logprob for token, logprob in reversed(event.likeliest)}
                for event in events
            ],
            "text_offset": offsets,
        }


class ChatFormat:
    """Chats. show: the text of one token. asked: whether log-probabilities are."""

    prefix, kind, piece_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, show: Callable[[int], str], asked: bool) -> None:
        self._show, self._asked = show, asked

    def begin(self, index: int) -> dict[str, Any] | None:
        """Makes the choice that a stream begins with."""
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def make_piece(self, index: int, piece: Piece) -> dict[str, Any]:
        """Makes a choice of a stream."""
        return self._make(index, piece, "delta", {"content": piece.text} if piece.text else {})

    def make_choice(self, index: int, piece: Piece) -> dict[str, Any]:
        """Makes a whole choice."""
        message = {"role": "assistant", "content": piece.text, "refusal": None}
        return self._make(index, piece, "message", message)

    def _make(self, index: int, piece: Piece, field: str, content: Any) -> dict[str, Any]:
        logprobs = {"content": [self._weigh(event) for event in piece.events], "refusal": None}
        return {
            "index": index,
            field: content,
            "token_ids": [event.token for event in piece.events],
            "logprobs": logprobs if self._asked else None,
            "finish_reason": piece.finish,
        }

    def _weigh(self, event: Event) -> dict[str, Any]:
        likeliest = [self._entry(token, logprob) for token, logprob in event.likeliest]
        return self._entry(event.token or 0, event.logprob) | {"top_logprobs": likeliest}

    def _entry(self, token: int, logprob: float | None) -> dict[str, Any]:
        text = self._show(token)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


Format = CompletionFormat | ChatFormat


def make_head(form: Format, model: str, *, piece: bool) -> dict[str, Any]:
    """Makes the fields that an answer, or each of its pieces, begins with; the id is ours."""
    identity = f"{form.prefix}-{uuid.uuid4().hex}"
    kind = form.piece_kind if piece else form.kind
    return {"id": identity, "object": kind, "created": int(time.time()), "model": model}


def count_usage(prompt: int, written: int) -> dict[str, int]:
    """Makes OpenAI's usage."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": written,
        "total_tokens": prompt + written,
    }
