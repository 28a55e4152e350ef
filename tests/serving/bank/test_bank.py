"""AdapterBank: who is on the device, who makes room, and what is lent stays as it is."""

from __future__ import annotations

import copy
import threading
from concurrent.futures import CancelledError

import pytest
import torch

from fastlora.serving import AdapterBank
from tests.support.banks import SHAPES, Adapter, assert_empty, assert_lends, bank, layout, settled

RANKS = (0, 1, 3, 8, 9, 16)


def filled(count: int, **options: object) -> tuple[AdapterBank, dict[str, Adapter]]:
    """A bank that knows a, b, c, ..."""
    of, adapters = bank(**options), {chr(97 + i): Adapter(i) for i in range(count)}
    for name, adapter in adapters.items():
        of.add(name, adapter)
    return of, adapters


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_images_hold_every_number(dtype):
    of = layout(16, dtype)
    for r in RANKS:
        factors = Adapter(r, {"one": r, "three": 16 - r}).factors
        back = of.factors(of.image(factors))
        assert back.keys() == {name for name, f in factors.items() if f.lora_A.shape[0]}
        for name, (A, B, scaling) in back.items():
            assert torch.equal(A, factors[name].lora_A.to(dtype))
            assert torch.equal(B, factors[name].lora_B.to(dtype))
            assert scaling == factors[name].scaling


@pytest.mark.parametrize("r", RANKS)
def test_ranks_take_what_they_need(r):
    of = bank(max_adapters=1)
    adapter = Adapter(1, r)
    of.add("a", adapter)
    assert_lends(of, {"a": adapter})
    of.add("b", Adapter(2, {"two": 1}))
    assert_lends(of, {"b": of._find("b").read})
    pages, wide = -(-r // 8), bank(max_adapters=1, max_rank=64)
    small = wide.layout.nbytes(dict.fromkeys(SHAPES, r))
    whole = wide.layout.nbytes(dict.fromkeys(SHAPES, 64))
    assert small * 8 == whole * pages
    wide.add("a", adapter)
    assert wide.stats().device_bytes_used == small


def test_the_least_recently_used_makes_room():
    of, adapters = filled(3)
    assert_lends(of, {"a": adapters["a"]})  # b is the oldest now
    assert_lends(of, {"c": adapters["c"]})
    assert [entry.name for entry in of._shelf.resident] == ["a", "c"]
    assert_lends(of, {"b": adapters["b"], "c": adapters["c"]})
    stats = of.stats()
    assert (stats.hits, stats.misses, stats.evictions) == (2, 2, 2)
    assert (stats.known, stats.resident, stats.copied, stats.reads) == (3, 2, 3, 0)
    assert all(adapter.reads == 1 for adapter in adapters.values())
    for name in adapters:
        of.remove(name)
    assert_empty(of)


def test_what_is_pinned_stays():
    of, adapters = filled(3)
    of.pin("a")
    for name in ("b", "c", "b"):
        assert_lends(of, {name: adapters[name]})
        assert "a" in [entry.name for entry in of._shelf.resident]
    of.pin("b")
    of.pin("b")  # twice is once
    with pytest.raises(
        RuntimeError, match=r"c: what is pinned \(a, b\) and runs .* leaves no room"
    ):
        of.lease(["c"]).result(60)
    with pytest.raises(RuntimeError, match="leaves no room"):
        of.pin("c")
    of.unpin("b")
    assert_lends(of, {"a": adapters["a"], "c": adapters["c"]})
    with pytest.raises(ValueError, match="'b' is not pinned"):
        of.unpin("b")
    other = Adapter(9)
    of.add("a", other)  # the pin goes on
    for name in ("b", "c"):
        assert_lends(of, {name: adapters[name]})
    assert next(entry.name for entry in of._shelf.resident) == "a"
    assert_lends(of, {"a": other})
    for name in ("a", "b", "c"):
        of.remove(name)  # pin and all
    assert_empty(of)


def test_what_is_lent_is_not_taken():
    of, adapters = filled(4)
    first, second = (of.lease([name]).result(60) for name in ("a", "b"))
    third = of.lease(["c"])
    settled(of)
    # The one used longest ago is lent no more, or who waits might wait for ever; others are.
    fourth, fifth = of.lease(["a"]), of.lease(["b"])
    settled(of)
    assert (third.done(), fourth.done(), fifth.done()) == (False, False, True)
    first.release()
    assert third.result(60).slots == first.slots
    for lease in (second, second, fifth.result()):  # more often does nothing
        lease.release()
    assert fourth.result(60).slots == second.slots
    assert of.stats().leases == 2
    for lease in (third.result(), fourth.result()):
        lease.release()
    assert_lends(of, {"d": adapters["d"], "a": adapters["a"]})
    assert of.stats().leases == 0


def test_who_does_not_fit_beside_what_he_asked_for():
    one = layout().nbytes(dict.fromkeys(SHAPES, 8))
    of, adapters = bank(max_adapters=3, device_bytes=2 * one), {}
    for name, r in (("small", 8), ("large", 16), ("medium", 9)):
        adapters[name] = Adapter(r, r)
        of.add(name, adapters[name])
    waits = of.lease(["small", "large"])
    with pytest.raises(RuntimeError, match=r"runs beside it \((large|small)\) leaves no room"):
        waits.result(60)
    for name in ("large", "small", "medium"):
        assert_lends(of, {name: adapters[name]})


def test_as_many_leave_as_it_takes():
    one = layout().nbytes(dict.fromkeys(SHAPES, 8))
    of, adapters = bank(max_adapters=8, device_bytes=3 * one), {}
    for name, r in (("a", 8), ("b", 8), ("c", 8), ("large", 16)):
        adapters[name] = Adapter(ord(name[0]), r)
        of.add(name, adapters[name])
    held = {name: of.lease([name]).result(60) for name in "abc"}
    large = of.lease(["large"])
    settled(of)
    again = {name: of.lease([name]) for name in "abc"}
    assert [future.done() for future in again.values()] == [False, False, True]
    held["a"].release()
    settled(of)
    assert not any(future.done() for future in (large, again["a"], again["b"]))
    held["b"].release()
    assert set(large.result(60).slots) <= {0, 1}
    for lease in (large.result(), held["c"], again["c"].result()):
        lease.release()
    for name in "ab":
        again[name].result(60).release()


def test_a_load_holds_up_nobody_else():
    of, adapters = filled(3, host_bytes=0)
    adapters["c"].may_read.clear()
    slow = of.lease(["c"])
    for _ in range(3):
        assert_lends(of, {"b": adapters["b"], "a": adapters["a"]})
    assert not slow.done()
    adapters["c"].may_read.set()
    with slow.result(60):
        assert_lends(of, {"c": adapters["c"]})


def test_no_room_in_the_host_s_memory():
    """Files are then read again, and are what they were, or nothing is lent."""
    of, adapters = filled(3, host_bytes=0)
    assert of.stats().host_bytes_used == 0
    for _ in range(2):
        for name, adapter in adapters.items():
            assert_lends(of, {name: adapter})
    assert all(adapter.reads > 1 for adapter in adapters.values())
    adapters["a"].factors = Adapter(77).factors
    assert_lends(of, {"b": adapters["b"], "c": adapters["c"]})
    with pytest.raises(RuntimeError, match="a: its files have changed since it was loaded"):
        of.lease(["a"]).result(60)
    adapters["a"].error = OSError("gone")
    with pytest.raises(OSError, match="gone"):
        of.lease(["b", "a"]).result(60)
    assert_lends(of, {"b": adapters["b"], "c": adapters["c"]})
    assert of.stats().leases == 0


def test_some_room_in_the_host_s_memory():
    size = layout().image(Adapter(0).factors).nbytes
    of, adapters = filled(4, host_bytes=2 * size)
    assert of.stats().host_bytes_used == 2 * size
    assert_lends(of, {"c": adapters["c"]})
    assert_lends(of, {"a": adapters["a"]})  # read again, in d's place: c was used since
    assert [entry.name for entry in of._shelf.copied] == ["c", "a"]
    assert {name: adapter.reads for name, adapter in adapters.items()} == {
        "a": 2, "b": 1, "c": 1, "d": 1,
    }  # fmt: skip


def test_the_same_name_again():
    of = filled(1)[0]
    before = of.digest("a")
    of.add("a", Adapter(0))  # the same content is the same adapter
    assert (of.digest("a"), of.stats().loads) == (before, 1)
    held = of.lease(["a"]).result(60)
    other = Adapter(5)
    of.add("a", other)
    assert of.digest("a") != before
    with of.lease(["a"]).result(60) as new:
        assert new.slots != held.slots
        assert held.entries[0].slot == held.slots[0]  # as it was
    assert of.stats().resident == 2
    held.release()
    settled(of)
    assert of.stats().resident == 1
    assert_lends(of, {"a": other})
    of.add("a", Adapter(5, scaling=0.25))
    assert_lends(of, {"a": Adapter(5, scaling=0.25)})


def test_unloading_what_is_in_use():
    of = filled(2)[0]
    lease = of.lease(["a"]).result(60)
    with pytest.raises(RuntimeError, match="'a' is in use; unload it with wait=True"):
        of.remove("a")
    assert of.names == ("a", "b")
    with pytest.raises(TimeoutError, match=r"still in use after 0\.05 s"):
        of.remove("a", wait=True, timeout=0.05)
    with pytest.raises(ValueError, match=r"no adapter 'a' is loaded .loaded: b"):
        of.lease(["a"])
    assert of.stats().resident == 2
    lease.release()
    settled(of)
    assert of.stats().resident == 1
    lease, gone = of.lease(["b"]).result(60), threading.Event()
    thread = threading.Thread(target=lambda: (of.remove("b", wait=True), gone.set()))
    thread.start()
    while of.names:
        pass
    assert not gone.is_set()
    lease.release()
    thread.join(60)
    assert gone.is_set()
    assert_empty(of)


def test_a_cancelled_wait_borrows_nothing():
    of, adapters = filled(3)
    lease = of.lease(["a", "b"]).result(60)
    futures = [of.lease(["c"]) for _ in range(3)]
    assert futures[0].cancel()
    assert futures[2].cancel()
    lease.release()
    futures[1].result(60).release()
    with pytest.raises(CancelledError):
        futures[0].result()
    settled(of)
    assert of.stats().leases == 0
    assert_lends(of, {"a": adapters["a"], "c": adapters["c"]})


def test_nothing_is_kept_of_who_gave_up():
    of, adapters = filled(3, host_bytes=0)
    lease = of.lease(["a", "b"]).result(60)
    waits = of.lease(["c"])
    settled(of)
    assert of._shelf.fresh[0].name == "c"  # read, and waiting for a place
    assert waits.cancel()
    of.remove("c", wait=True, timeout=60)
    assert of._shelf.fresh is None
    assert of.lease(["a"]).result(60).slots == lease.slots[:1]  # a has to leave for nobody
    assert adapters["c"].reads == 2


def test_a_budget_in_bytes():
    one = layout().nbytes(dict.fromkeys(SHAPES, 8))
    of = bank(max_adapters=8, device_bytes=3 * one)
    assert of.stats().device_bytes <= 3 * one
    small = [Adapter(i) for i in range(3)]
    for i, adapter in enumerate(small):
        of.add(f"small{i}", adapter)
    assert of.stats().resident == 3
    large = Adapter(7, 16)
    of.add("large", large)
    assert of.stats().resident == 3
    assert_lends(of, {"large": large})
    assert [entry.name for entry in of._shelf.resident] == ["small2", "large"]
    with pytest.raises(ValueError, match=rf"device_bytes: 'huge' takes {2 * one} bytes in pages"):
        bank(device_bytes=2 * one - 1).add("huge", Adapter(8, 16))
    for bad, kind in ((-1, ValueError), (1.5, TypeError), (True, TypeError)):
        for name in ("device_bytes", "host_bytes"):
            with pytest.raises(kind, match=name):
                bank(**{name: bad})


@pytest.mark.parametrize(
    "change, says",
    [
        ({"one": Adapter(0, 17).factors["one"]}, "one: expected a rank of at most 16, got 17"),
        ({"four": Adapter(0).factors["one"]}, "four: the adapter is for a layer that is not"),
        ({"one": Adapter(0).factors["two"]}, r"one: expected lora_A \(r, 43\)"),
        ({"one": Adapter(0, scaling=float("nan")).factors["one"]}, "one: expected a finite scal"),
        ({"one": Adapter(0, scaling=1e39).factors["one"]}, "one: expected a finite scaling"),
    ],
)
def test_what_does_not_fit_changes_nothing(change, says):
    of, adapters = filled(1)
    bad = Adapter(3)
    bad.factors |= change
    before = of.stats()
    for name in ("a", "new"):
        with pytest.raises(ValueError, match=says):
            of.add(name, bad)
    assert of.stats() == before
    assert_lends(of, {"a": adapters["a"]})


def test_more_than_fit_at_a_time():
    of = filled(3)[0]
    with pytest.raises(ValueError, match="at most max_adapters=2 different ones, got 3"):
        of.lease(["a", "b", "c"])
    with of.lease(["a", "b", "a", "a"]).result(60) as lease:
        assert len(set(lease.slots)) == 2
        assert of.stats().leases == 2
    with of.lease([]).result(60) as lease:
        assert lease.slots == ()


def test_copies_know_what_the_bank_knew():
    of, adapters = filled(3, host_bytes=1 << 20)
    lease = of.lease(["a"]).result(60)
    twin = copy.deepcopy(of)
    assert twin.stats().leases == 0
    of.remove("b")
    for name, adapter in adapters.items():
        assert_lends(twin, {name: adapter})
    lease.release()


def test_another_dtype():
    of, adapters = filled(3)
    of.pin("b")
    lease = of.lease(["a"]).result(60)
    with pytest.raises(RuntimeError, match="adapters are in use"):
        of.rebuild(layout(dtype=torch.float64))
    lease.release()
    of.rebuild(layout(dtype=torch.float64))
    assert [entry.name for entry in of._shelf.resident] == ["b"]
    assert of.pages("one").lora_A.dtype == torch.float64
    of.rebuild(layout())
    for name, adapter in adapters.items():
        assert_lends(of, {name: adapter})
