"""AdapterBank lends adapters, evicts the least recently used, and never takes a lent one."""

from __future__ import annotations

import pytest
import torch

from fastlora.serving import AdapterBank
from tests.support.serving.banks import (
    SHAPES,
    Adapter,
    assert_empty,
    assert_lends,
    bank,
    layout,
    wait_until_settled,
)

RANKS = (0, 1, 3, 8, 9, 16)


def bank_with_adapters(count: int, **options: object) -> tuple[AdapterBank, dict[str, Adapter]]:
    """A bank that knows a, b, c, ..."""
    of, adapters = bank(**options), {chr(97 + i): Adapter(i) for i in range(count)}
    for name, adapter in adapters.items():
        of.add(name, adapter)
    return of, adapters


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_layout_image_gives_back_all_factors(dtype):
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
def test_adapter_takes_pages_according_to_its_rank(r):
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


def test_bank_evicts_least_recently_used_adapter():
    of, adapters = bank_with_adapters(3)
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


def test_pinned_adapter_is_never_evicted():
    of, adapters = bank_with_adapters(3)
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


def test_lent_adapter_keeps_its_slot_until_released():
    of, adapters = bank_with_adapters(4)
    first, second = (of.lease([name]).result(60) for name in ("a", "b"))
    third = of.lease(["c"])
    wait_until_settled(of)
    # The one used longest ago is lent no more, or who waits might wait for ever; others are.
    fourth, fifth = of.lease(["a"]), of.lease(["b"])
    wait_until_settled(of)
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


def test_request_larger_than_device_bytes_is_refused():
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


def test_bank_evicts_only_enough_adapters_to_fit():
    one = layout().nbytes(dict.fromkeys(SHAPES, 8))
    of, adapters = bank(max_adapters=8, device_bytes=3 * one), {}
    for name, r in (("a", 8), ("b", 8), ("c", 8), ("large", 16)):
        adapters[name] = Adapter(ord(name[0]), r)
        of.add(name, adapters[name])
    held = {name: of.lease([name]).result(60) for name in "abc"}
    large = of.lease(["large"])
    wait_until_settled(of)
    again = {name: of.lease([name]) for name in "abc"}
    assert [future.done() for future in again.values()] == [False, False, True]
    held["a"].release()
    wait_until_settled(of)
    assert not any(future.done() for future in (large, again["a"], again["b"]))
    held["b"].release()
    assert set(large.result(60).slots) <= {0, 1}
    for lease in (large.result(), held["c"], again["c"].result()):
        lease.release()
    for name in "ab":
        again[name].result(60).release()


def test_slow_load_does_not_block_other_leases():
    of, adapters = bank_with_adapters(3, host_bytes=0)
    adapters["c"].may_read.clear()
    slow = of.lease(["c"])
    for _ in range(3):
        assert_lends(of, {"b": adapters["b"], "a": adapters["a"]})
    assert not slow.done()
    adapters["c"].may_read.set()
    with slow.result(60):
        assert_lends(of, {"c": adapters["c"]})


def test_bank_rereads_files_when_host_bytes_is_zero():
    """Files are then read again, and are what they were, or nothing is lent."""
    of, adapters = bank_with_adapters(3, host_bytes=0)
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


def test_host_copies_are_evicted_beyond_host_bytes():
    size = layout().image(Adapter(0).factors).nbytes
    of, adapters = bank_with_adapters(4, host_bytes=2 * size)
    assert of.stats().host_bytes_used == 2 * size
    assert_lends(of, {"c": adapters["c"]})
    assert_lends(of, {"a": adapters["a"]})  # read again, in d's place: c was used since
    assert [entry.name for entry in of._shelf.copied] == ["c", "a"]
    assert {name: adapter.reads for name, adapter in adapters.items()} == {
        "a": 2, "b": 1, "c": 1, "d": 1,
    }  # fmt: skip
