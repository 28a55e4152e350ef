"""All or none: every way back is taken, and one that fails is not kept quiet."""

from __future__ import annotations

import pytest

from fastlora.backends.merge_lists import undo as each


def test_ways_back_are_taken_last_first_and_all():
    taken = []

    def broken():
        taken.append("broken")
        raise ValueError("cannot")

    def work():
        with each.all_or_none() as done:
            done.append(lambda: taken.append("first"))
            done.append(broken)
            done.append(lambda: taken.append("last"))
            raise MemoryError("none left")

    with pytest.raises(
        RuntimeError, match="none left; and not all could be undone: cannot"
    ) as info:
        work()
    assert taken == ["last", "broken", "first"]
    assert isinstance(info.value.__cause__, MemoryError)


def test_nothing_is_taken_back_where_nothing_failed():
    taken = []
    with each.all_or_none() as done:
        done.append(lambda: taken.append(1))
    assert not taken
