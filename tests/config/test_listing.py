"""Lists in messages: the first few, and how many more."""

from __future__ import annotations

from fastlora.config.listing import group_by_reason, list_some


def test_list_some_shows_few_and_counts_rest():
    assert list_some([]) == ""
    assert list_some("ab") == "a, b"
    assert list_some({"c", "a", "b"}) == "a, b, c"
    assert list_some(range(5)) == "0, 1, 2, 3 and 1 more"
    assert list_some((str(n) for n in range(9)), 2, "; ") == "0; 1 and 7 more"
    assert len(list_some(map(str, range(10_000)))) < 40


def test_group_by_reason_joins_names_per_reason():
    assert group_by_reason({"a": "x", "b": "y", "c": "x"}) == ["a and 1 more: x", "b: y"]
