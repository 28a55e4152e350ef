"""Thinning the quick run keeps every pair of parameter values that can run."""

import random
from itertools import combinations, product

import pytest

from tests.thinning import FEW, cover, thin

pytest_plugins = ["pytester"]

THREE = range(3)


def pairs(row) -> set:
    return set(combinations(enumerate(row), 2))


@pytest.mark.parametrize("sizes", [(3, 3, 3), (13, 6, 2, 3), (5, 1, 4), (2,) * 8, (7,), (4, 9)])
def test_cover_keeps_every_pair_of_values(sizes):
    rows = list(product(*map(range, sizes)))
    kept = [rows[i] for i in cover(rows)]
    assert set().union(*map(pairs, kept)) == set().union(*map(pairs, rows))
    assert {(c, v) for row in kept for c, v in enumerate(row)} == {
        (c, v) for c, size in enumerate(sizes) for v in range(size)
    }
    # The two longest parameters need as many; few more do for all.
    least = max(sizes) * (sorted(sizes)[-2] if len(sizes) > 1 else 1)
    assert least <= len(kept) <= 1.5 * least + len(sizes)


def test_cover_keeps_all_pairs_of_incomplete_grid():
    draw = random.Random(0)
    rows = [row for row in product(range(6), THREE, range(4)) if draw.random() < 0.4]
    kept = [rows[i] for i in cover(rows)]
    assert len(kept) < len(rows)
    assert set().union(*map(pairs, kept)) == set().union(*map(pairs, rows))


def test_cover_keeps_all_core_combinations():
    rows = list(product(range(13), THREE, range(6), range(2)))
    kept = [rows[i] for i in cover(rows, core=[1, 2, 3])]
    assert {row[1:] for row in kept} == {row[1:] for row in rows}
    assert len(kept) == 13 * 6


def test_cover_is_deterministic_whatever_the_values():
    rows = list(product("abcde", "xyz", "pq", "uvw"))
    numbers = {letter: i for i, letter in enumerate("vqxzaycpwudbe")}
    again = [tuple(numbers[letter] for letter in row) for row in rows]
    assert cover(rows, [1, 2]) == cover(rows, [1, 2]) == cover(again, [1, 2])


@pytest.fixture
def thin_source(pytester):
    """Of tests in a file of their own, those kept, those left out, and why which skip."""

    def of(source: str) -> tuple[list, list, dict]:
        head = "import pytest, torch\nfrom tests.thinning import skip_where\n"
        given = "pytest.mark.parametrize"
        source = head + source.replace("GIVEN", given)
        # Which collects garbage at its end, again and again: here, all that the suite has made.
        options = ["-p", "no:unraisableexception"]
        items = pytester.genitems([pytester.getmodulecol(source, options)])
        thin(items)
        values = [tuple(item.callspec.params.values()) for item in items]
        full = [item.get_closest_marker("full") is not None for item in items]
        skips = [item.get_closest_marker("skip") for item in items]
        kept = [v for v, left_out in zip(values, full, strict=True) if not left_out]
        rest = [v for v, left_out in zip(values, full, strict=True) if left_out]
        why = {v: mark.kwargs["reason"] for v, mark in zip(values, skips, strict=True) if mark}
        return kept, rest, why

    return of


CUBE = "@GIVEN('c', range(3))\n@GIVEN('b', range(3))\n@GIVEN('a', range(3))\n"


def test_thin_marks_part_of_grid_full(thin_source):
    kept, rest, why = thin_source(CUBE + "def test(a, b, c): ...")
    assert len(kept) + len(rest) == 27
    assert len(kept) < 14
    assert set().union(*map(pairs, kept)) == set().union(*map(pairs, product(THREE, repeat=3)))
    assert not why


def test_thin_keeps_all_of_few_combinations(thin_source):
    kept, rest, _ = thin_source(
        "@GIVEN('c', range(2))\n@GIVEN('b', range(2))\n@GIVEN('a', range(2))\n"
        "def test(a, b, c): ..."
    )
    assert (len(kept), rest) == (FEW, [])


def test_thin_does_not_count_skipped_combinations(thin_source):
    """Of pairs that two combinations have, the one that runs is kept."""
    kept, rest, why = thin_source(
        "def odd(a, c): return 'odd' if (a + c) % 2 else None\n"
        "@skip_where(odd)\n" + CUBE + "def test(a, b, c): ..."
    )
    runs = [row for row in product(THREE, repeat=3) if (row[0] + row[2]) % 2 == 0]
    assert set(why) == set(product(THREE, repeat=3)) - set(runs)
    assert set(why.values()) == {"odd"}
    assert set(why) <= set(rest)
    assert set().union(*map(pairs, kept)) == set().union(*map(pairs, runs))


def test_thin_keeps_one_when_all_skip(thin_source):
    kept, rest, why = thin_source(
        "def never(): return 'never'\n@skip_where(never)\n" + CUBE + "def test(a, b, c): ..."
    )
    assert (len(kept), len(rest), len(why)) == (1, 26, 27)
    assert kept[0] in why


def test_thin_does_not_count_combinations_marked_full(thin_source):
    kept, _, _ = thin_source(
        "long = pytest.param(2, marks=pytest.mark.full)\n"
        "@GIVEN('a', [0, 1, long])\n@GIVEN('b', range(3))\n@GIVEN('c', range(3))\n"
        "def test(a, b, c): ..."
    )
    assert 2 not in {dict(zip("cba", row, strict=True))["a"] for row in kept}
    short = list(product(THREE, THREE, (0, 1)))
    assert set().union(*map(pairs, kept)) == set().union(*map(pairs, short))


def test_thin_chooses_separately_for_each_device(thin_source):
    kept, _, _ = thin_source(
        "@GIVEN('device', ['cpu', 'cuda'])\n" + CUBE + "def test(device, a, b, c): ..."
    )
    for device in ("cpu", "cuda"):
        mine = [[v for v in row if v != device] for row in kept if device in row]
        assert set().union(*map(pairs, mine)) == set().union(*map(pairs, product(THREE, repeat=3)))


def test_thin_treats_joint_names_as_one_parameter(thin_source):
    """And every op on every backend in every dtype stays."""
    kept, rest, _ = thin_source(
        "dtypes = [(torch.float32,) * 2, (torch.float16,) * 2, (torch.float16, torch.float32)]\n"
        "@GIVEN('dtype, lora_dtype', dtypes)\n@GIVEN('through', [1, 2])\n"
        "@GIVEN('backend', ['torch', 'cpu'])\n@GIVEN(('M', 'N'), [(1, 2), (3, 4), (5, 6)])\n"
        "def test(M, N, backend, through, dtype, lora_dtype): ..."
    )
    core = {(row[2:]) for row in kept}
    assert len(core) == 3 * 2 * 2
    assert len(kept) == 12
    assert len(rest) == 24


def test_thin_distinguishes_values_by_type(thin_source):
    """Lists have no hash; 1, True and 1.0 are equal, and no test of one is a test of another."""
    kept, _, _ = thin_source(
        "@GIVEN('c', range(2))\n@GIVEN('b', [[], {}, [1]])\n@GIVEN('a', [1, True, 1.0])\n"
        "def test(a, b, c): ..."
    )
    assert len({(type(a), str(b)) for a, b, _ in kept}) == 9
    assert len({(type(a), c) for a, _, c in kept}) == 6


OWN = list(product(THREE, THREE, "pqr"))


@pytest.mark.parametrize("c", "pqr")
@pytest.mark.parametrize("b", THREE)
@pytest.mark.parametrize("a", THREE)
def test_suite_itself_is_thinned_as_computed(a, b, c, request):
    chosen = OWN.index((a, b, c)) in cover(OWN)
    assert chosen == (request.node.get_closest_marker("full") is None)


def test_suite_begins_with_what_is_shared(request):
    """Where xdist parts it among workers, both would start a server."""
    shared = [bool(i.get_closest_marker("shared_start")) for i in request.session.items]
    assert shared == sorted(shared, reverse=True)
