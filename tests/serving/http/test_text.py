"""Text comes in whole characters, and ends before the first stop string, wherever borders lie."""

from __future__ import annotations

import random

import pytest

from fastlora.serving.http.text import Stops, Text
from tests.support.serving.http_server import tokenizer


@pytest.mark.parametrize("text", ["Süß – 日本語 🎉!", "plain", "é"])
@pytest.mark.parametrize("step", [1, 2, 5])
def test_text_pieces_are_whole_characters(text, step):
    coder = tokenizer()
    ids = coder(text)["input_ids"]
    writer = Text(coder.decode)
    pieces = [writer.add(ids[i : i + step]) for i in range(0, len(ids), step)]
    assert "".join(pieces) + writer.add([], last=True) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_text_shows_what_never_becomes_a_character():
    coder = tokenizer()
    ids = coder("é")["input_ids"]
    cut = Text(coder.decode)
    assert (cut.add(ids[:1]), cut.add([], last=True)) == ("", "\ufffd")
    wrong = Text(coder.decode)
    pieces = [wrong.add(ids[:1]) for _ in range(20)]
    assert "".join(pieces)  # before the end
    assert "".join(pieces) + wrong.add([], last=True) == "\ufffd" * 20


def test_stops_end_text_at_the_first_match_whatever_the_pieces():
    """Against a search in the whole text, over a small alphabet so that beginnings abound."""
    draw = random.Random(3)
    for _ in range(3000):
        text = "".join(draw.choices("ab", k=draw.randrange(20)))
        stops = [
            "".join(draw.choices("ab", k=draw.randint(1, 5))) for _ in range(draw.randint(0, 3))
        ]
        finder, shown, over, at = Stops(stops), "", False, 0
        while not over:
            step = draw.randint(1, 4)
            piece, over = finder.add(text[at : at + step], last=at + step >= len(text))
            shown, at = shown + piece, at + step
            if at >= len(text):
                break
        # The match that ends first is seen first; of those in one piece, the one that begins first.
        ends = {text.find(stop) + len(stop) for stop in stops if stop in text}
        assert over == bool(ends)
        if not ends:
            assert shown == text
        else:
            assert text.startswith(shown)
            assert any(text.startswith(stop, len(shown)) for stop in stops)
            assert not any(stop in shown for stop in stops)


def test_stops_hold_back_no_more_than_could_match():
    finder = Stops(["<end>"])
    assert [finder.add(piece) for piece in ("a<e", "nx", "b<", "c")] == [
        ("a", False),
        ("<enx", False),
        ("b", False),
        ("<c", False),
    ]
