"""Text of tokens as they come, and the strings that end it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

# What decoders give for bytes that are no whole character yet.
_INCOMPLETE = "\ufffd"
# Bytes of a character; a token that never becomes one is shown after so many others.
_PATIENCE = 8


class Text:
    """Text of tokens, piece by piece; a character of several tokens comes with its last one."""

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._before = self._shown = 0
        self._known = ""

    def add(self, ids: Sequence[int], last: bool = False) -> str:
        """Returns the text that is complete with ``ids``, or all of it with the last ones."""
        self._ids += ids
        if self._shown == len(self._ids):
            return ""
        # Decoded with the piece before it: a token's text may depend on its neighbour.
        text = self._decode(self._ids[self._before :])
        waiting = len(self._ids) - self._shown
        if text.endswith(_INCOMPLETE) and not last and waiting < _PATIENCE:
            return ""
        piece = text[len(self._known) :]
        self._before, self._shown = self._shown, len(self._ids)
        self._known = self._decode(self._ids[self._before :])
        return piece


class Stops:
    """Finds the first of some strings in text that comes in pieces; its beginning is held back."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def add(self, piece: str, last: bool = False) -> tuple[str, bool]:
        """Returns text that is no part of a stop string, and whether one came and ended it."""
        if not self._stops:
            return piece, False
        text = self._held + piece
        ends = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if ends:
            self._held = ""
            return text[: min(ends)], True
        held = 0 if last else max(map(len, self._stops)) - 1
        while held and not any(
            len(text) >= held and stop.startswith(text[-held:]) for stop in self._stops
        ):
            held -= 1
        self._held = text[len(text) - held :]
        return text[: len(text) - held], False
