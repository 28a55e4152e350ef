"""AdapterBank keeps its budgets, replaces names, and handles cancelled or too large requests."""

from __future__ import annotations

import copy
import threading
from concurrent.futures import CancelledError

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


def bank_with_adapters(count: int, **options: object) -> tuple[AdapterBank, dict[str, Adapter]]:
    """A bank that knows a, b, c, ..."""
    of, adapters = bank(**options), {chr(97 + i): Adapter(i) for i in range(count)}
    for name, adapter in adapters.items():
        of.add(name, adapter)
    return of, adapters


def test_add_of_known_name_replaces_changed_content():
    of = bank_with_adapters(1)[0]
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
    wait_until_settled(of)
    assert of.stats().resident == 1
    assert_lends(of, {"a": other})
    of.add("a", Adapter(5, scaling=0.25))
    assert_lends(of, {"a": Adapter(5, scaling=0.25)})


def test_remove_refuses_or_waits_for_adapter_in_use():
    of = bank_with_adapters(2)[0]
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
    wait_until_settled(of)
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


def test_cancelled_lease_borrows_nothing():
    of, adapters = bank_with_adapters(3)
    lease = of.lease(["a", "b"]).result(60)
    futures = [of.lease(["c"]) for _ in range(3)]
    assert futures[0].cancel()
    assert futures[2].cancel()
    lease.release()
    futures[1].result(60).release()
    with pytest.raises(CancelledError):
        futures[0].result()
    wait_until_settled(of)
    assert of.stats().leases == 0
    assert_lends(of, {"a": adapters["a"], "c": adapters["c"]})


def test_cancelled_request_frees_everything():
    of, adapters = bank_with_adapters(3, host_bytes=0)
    lease = of.lease(["a", "b"]).result(60)
    waits = of.lease(["c"])
    wait_until_settled(of)
    assert of._shelf.fresh[0].name == "c"  # read, and waiting for a place
    assert waits.cancel()
    of.remove("c", wait=True, timeout=60)
    assert of._shelf.fresh is None
    assert of.lease(["a"]).result(60).slots == lease.slots[:1]  # a has to leave for nobody
    assert adapters["c"].reads == 2


def test_bank_stays_within_device_bytes():
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
def test_add_of_wrong_factors_changes_nothing(change, says):
    of, adapters = bank_with_adapters(1)
    bad = Adapter(3)
    bad.factors |= change
    before = of.stats()
    for name in ("a", "new"):
        with pytest.raises(ValueError, match=says):
            of.add(name, bad)
    assert of.stats() == before
    assert_lends(of, {"a": adapters["a"]})


def test_lease_refuses_more_than_max_adapters():
    of = bank_with_adapters(3)[0]
    with pytest.raises(ValueError, match="at most max_adapters=2 different ones, got 3"):
        of.lease(["a", "b", "c"])
    with of.lease(["a", "b", "a", "a"]).result(60) as lease:
        assert len(set(lease.slots)) == 2
        assert of.stats().leases == 2
    with of.lease([]).result(60) as lease:
        assert lease.slots == ()


def test_copied_bank_lends_the_same_adapters():
    of, adapters = bank_with_adapters(3, host_bytes=1 << 20)
    lease = of.lease(["a"]).result(60)
    twin = copy.deepcopy(of)
    assert twin.stats().leases == 0
    of.remove("b")
    for name, adapter in adapters.items():
        assert_lends(twin, {name: adapter})
    lease.release()


def test_rebuild_changes_dtype_when_nothing_is_lent():
    of, adapters = bank_with_adapters(3)
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
