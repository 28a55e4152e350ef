"""all_or_none takes everything back on an error and reports what could not be."""

from __future__ import annotations

import pytest

from fastlora.backends.merge_lists import errors
from fastlora.backends.merge_lists.undo import all_or_none


def test_undo_runs_every_step_last_first():
    taken = []

    def broken(step):
        taken.append(step)
        raise ValueError("cannot")

    def work():
        with all_or_none() as undo:
            undo.push(taken.append, "first")
            undo.push(broken, "broken")
            undo.push(taken.append, "last")
            raise MemoryError("none left")

    with pytest.raises(
        RuntimeError, match="none left; and not all could be undone: cannot"
    ) as info:
        work()
    assert taken == ["last", "broken", "first"]
    assert isinstance(info.value.__cause__, MemoryError)


def test_undo_runs_nothing_without_an_error():
    taken = []
    with all_or_none() as undo:
        undo.push(taken.append, 1)
    assert not taken


def fail(error):
    raise error


def test_nested_error_is_named_once_by_outermost():
    """Through two levels of parts of a call, and through what could not be undone."""

    def work():
        with errors.named(["a", "b", "c"]), all_or_none() as undo:
            undo.push(fail, ValueError("cannot"))
            with errors.among([2, 0]), errors.among([1, 0]), errors.at(1):
                fail(TypeError("weight: no"))

    with pytest.raises(RuntimeError, match=r"^c: weight: no; and not all .*: cannot$") as info:
        work()
    assert info.value.index == 2


@pytest.mark.parametrize(
    "names, error, message",
    [
        (["a", "b"], ValueError("of none"), "of none"),
        (["a"], ValueError("of it"), "a: of it"),
        ([""], ValueError("of it"), "of it"),
        (["a"], OSError("no error of a weight"), "no error of a weight"),
    ],
)
def test_error_is_named_only_when_about_one_weight(names, error, message):
    with pytest.raises(type(error), match=f"^{message}$"), errors.named(names):
        fail(error)
