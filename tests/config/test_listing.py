"""Lists in messages: the first few, and how many more."""

from __future__ import annotations

from fastlora.config.listing import by_reason, some


def test_some():
    assert some([]) == ""
    assert some("ab") == "a, b"
    assert some({"c", "a", "b"}) == "a, b, c"
    assert some(range(5)) == "0, 1, 2, 3 and 1 more"
    assert some((str(n) for n in range(9)), 2, "; ") == "0; 1 and 7 more"
    assert len(some(map(str, range(10_000)))) < 40


def test_by_reason():
    assert by_reason({"a": "x", "b": "y", "c": "x"}) == ["a and 1 more: x", "b: y"]
