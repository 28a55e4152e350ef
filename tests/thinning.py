"""Which combinations of a test's parameters are quick; the others are marked ``full``.

Of a grid of three parameters and more the quick ones have every value of each parameter beside
every value of each other, and all of op × backend × dtype.
"""

from __future__ import annotations

import heapq
import inspect
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from itertools import combinations

import pytest
import torch

# A grid of so few combinations stays whole.
FEW = 8
# Parameters that say which code runs: whatever occurs of their product is kept.
CORE = {"dtype", "lora_dtype", "through", "op", "path", "instruction_set"}
CORE |= {"backend", "whole_backend", "merge_backend"}

Row = tuple[Hashable, ...]


def skip_where(when: Callable[..., str | None]) -> pytest.MarkDecorator:
    """Skips the combinations for which ``when``, of the parameters that it names, gives a reason.

    ``pytest.skip`` within a test comes too late: what skips there may have been chosen to stand
    for others that would have run.
    """
    return pytest.mark.skip_where.with_args(when)


def thin(items: Iterable[pytest.Item]) -> None:
    """Marks as such what skips, and as ``full`` what a quick run can do without."""
    functions = defaultdict(list)
    for item in items:
        functions[item.nodeid.partition("[")[0]].append(item)
    for same in functions.values():
        _thin_function(same)


def _thin_function(items: Sequence[pytest.Item]) -> None:
    devices = defaultdict(list)  # each has a choice of its own
    for item in items:
        reason = _reason_to_skip(item)
        if reason is not None:
            item.add_marker(pytest.mark.skip(reason=reason))
        elif not item.get_closest_marker("full"):
            devices[str(_params(item).get("device"))].append(item)
    kept = set()
    for runs in devices.values():
        kept |= {runs[i] for i in cover(*_table(runs))} if len(runs) > FEW else set(runs)
    # Where none runs, one says why.
    for item in set(items).difference(kept or items[:1]):
        item.add_marker("full")


def cover(rows: Sequence[Row], core: Sequence[int] = ()) -> list[int]:
    """Indices of rows that have every pair of values of two columns, and all there is of ``core``.

    The row with most that is new comes next; of several the first.
    """
    wanted = [_goals(row, core) for row in rows]
    missing = set().union(*wanted)
    waiting = [(-len(goals), i) for i, goals in enumerate(wanted)]
    heapq.heapify(waiting)
    chosen = []
    while missing:
        _, i = heapq.heappop(waiting)
        again = (-len(wanted[i] & missing), i)
        # What a row brings only falls: if it is still the most, no other need be looked at.
        if waiting and again > waiting[0]:
            heapq.heappush(waiting, again)
        else:
            chosen.append(i)
            missing -= wanted[i]
    return sorted(chosen)


def _goals(row: Row, core: Sequence[int]) -> set[Hashable]:
    cells = list(enumerate(row))
    return {*cells, *combinations(cells, 2), tuple(cells[c] for c in core)}


def _table(items: Sequence[pytest.Item]) -> tuple[list[Row], list[int]]:
    """Each item's parameters, a row, and which columns are of the core.

    What is given together, as "dtype, lora_dtype" is, is one column. Values need no hash and may
    be equal, as 1 and True are: they are told apart by what they are.
    """
    together = {name: (name,) for name in items[0].callspec.params}
    for mark in items[0].iter_markers("parametrize"):
        names = _names(mark)
        together |= dict.fromkeys(names, names)
    columns = list(dict.fromkeys(together.values()))
    rows = [
        tuple(tuple(id(item.callspec.params[name]) for name in names) for names in columns)
        for item in items
    ]
    varying = [c for c in range(len(columns)) if len({row[c] for row in rows}) > 1]
    core = [i for i, c in enumerate(varying) if CORE.intersection(columns[c])]
    return [tuple(row[c] for c in varying) for row in rows], core


def _names(mark: pytest.Mark) -> tuple[str, ...]:
    names = mark.args[0] if mark.args else mark.kwargs["argnames"]
    return tuple(n.strip() for n in names.split(",")) if isinstance(names, str) else tuple(names)


def _reason_to_skip(item: pytest.Item) -> str | None:
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        return "no NVIDIA GPU here"
    given = dict(_params(item))
    given["device"] = torch.device(given.get("device", "cpu"))
    for mark in item.iter_markers("skip_where"):
        (when,) = mark.args
        names = inspect.signature(when).parameters
        reason = when(**{name: given[name] for name in names if name in given})
        if reason is not None:
            return reason
    return None


def _params(item: pytest.Item) -> dict[str, object]:
    return item.callspec.params if hasattr(item, "callspec") else {}
