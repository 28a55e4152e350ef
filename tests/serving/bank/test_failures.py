"""AdapterBank stays usable when a load, a move or a waiting request fails."""

from __future__ import annotations

import os
import threading
from collections import Counter
from concurrent.futures import wait
from typing import Any

import pytest
import torch

from fastlora.serving import AdapterBank, Factors, Layout
from fastlora.serving.bank import shelf
from tests.support.serving.banks import (
    SHAPES,
    Adapter,
    assert_empty,
    assert_lends,
    bank,
    layout,
    wait_until_settled,
)


def bank_with_adapters(count: int, **options: Any) -> tuple[AdapterBank, dict[str, Adapter]]:
    of, adapters = bank(**options), {chr(97 + i): Adapter(i) for i in range(count)}
    for name, adapter in adapters.items():
        of.add(name, adapter)
    return of, adapters


def test_lease_waits_while_bank_is_rebuilt(monkeypatch):
    of, adapters = bank_with_adapters(3)
    begun, go, real = threading.Event(), threading.Event(), shelf.Device

    def slow(*args: Any) -> Any:
        begun.set()
        assert go.wait(60)
        return real(*args)

    monkeypatch.setattr(shelf, "Device", slow)
    wide = layout(dtype=torch.float64)
    moving = threading.Thread(target=of.rebuild, args=(wide,))
    moving.start()
    assert begun.wait(60)
    lease, added = of.lease(["a"]), threading.Thread(target=of.add, args=("z", Adapter(26)))
    added.start()
    assert not lease.done()
    go.set()
    moving.join(60)
    added.join(60)
    lease.result(60).release()
    of.rebuild(wide)  # it is there already: nothing is done
    assert of.pages("one").lora_A.dtype == torch.float64
    of.rebuild(layout())
    for name, adapter in (adapters | {"z": Adapter(26)}).items():
        assert_lends(of, {name: adapter})


def test_failed_rebuild_leaves_bank_unchanged(monkeypatch):
    of, adapters = bank_with_adapters(3)
    of.pin("b")
    made, real = [], Layout.image

    def failing(self: Layout, factors: Any) -> Any:
        made.append(1)
        if len(made) == 2:
            raise MemoryError("no more")
        return real(self, factors)

    monkeypatch.setattr(Layout, "image", failing)
    with pytest.raises(MemoryError):
        of.rebuild(layout(dtype=torch.float64))
    for name, adapter in adapters.items():
        assert_lends(of, {name: adapter})
    one = layout().nbytes(dict.fromkeys(SHAPES, 8))
    small, adapters = bank_with_adapters(1, device_bytes=one)
    small.pin("a")
    with pytest.raises(RuntimeError, match=r"pinned adapters need more than .* unpin some"):
        small.rebuild(layout(dtype=torch.float64))
    assert_lends(small, {"a": adapters["a"]})
    small.unpin("a")
    small.rebuild(layout(dtype=torch.float64))
    with pytest.raises(RuntimeError, match="a: it is larger than the device's"):
        small.borrow(["a"])


def test_page_reuse_waits_for_every_reading_stream(monkeypatch):
    """Of each stream for the last event, and for no more of them than there are streams."""
    of, waited, events = bank(max_adapters=1), [], Counter()
    for name, seed in (("a", 0), ("b", 1)):
        of.add(name, Adapter(seed))
    device = of._shelf.device

    def record_events() -> Any:
        stream = int(threading.current_thread().name)
        events[stream] += 1
        return {(0, stream): (stream, events[stream])}

    real = device.wipe
    monkeypatch.setattr(device, "record_events", record_events)
    monkeypatch.setattr(
        device, "wipe", lambda slot, blocks, after: (waited.append(after), real(slot, blocks, {}))
    )
    held = of.borrow(["a"])
    for turn in range(6):
        lease = of.borrow(["a"])
        thread = threading.Thread(target=lease.release, name=str(turn % 2))
        thread.start()
        thread.join()
    threading.Thread(target=held.release, name="1").start()
    lent = of.lease(["b"]).result(60)
    assert waited == [{(0, 0): (0, 3), (0, 1): (1, 4)}]
    threading.Thread(target=lent.release, name="2").start()


def test_reader_error_fails_only_leases_of_its_adapter():
    class Panic(BaseException):
        pass

    of, adapters = bank_with_adapters(3, host_bytes=0)
    adapters["c"].error = Panic("reader")
    bad, good = of.lease(["c"]), of.lease(["b"])
    with pytest.raises(Panic):
        bad.result(60)
    good.result(60).release()
    assert_lends(of, {"a": adapters["a"]})


def test_cancelled_lease_inside_queue_blocks_nothing():
    of, _ = bank_with_adapters(4)
    held = of.borrow(["a", "b"])
    first, second = of.lease(["c"]), of.lease(["d"])
    wait_until_settled(of)
    assert second.cancel()
    of.remove("d", wait=True, timeout=60)
    assert first.cancel()
    assert wait([first, second], 60).not_done == set()
    held.release()
    for name in "abc":
        of.remove(name, wait=True, timeout=60)
    assert_empty(of)


def test_interrupted_borrow_releases_its_lease():
    of, adapters = bank_with_adapters(3)
    held = of.borrow(["a", "b"])
    real, of.lease = of.lease, lambda names: _Interrupted(real(names))  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        of.borrow(["c"])
    of.lease = real  # type: ignore[method-assign]
    held.release()
    wait_until_settled(of)
    assert of.stats().leases == 0
    assert_lends(of, {"c": adapters["c"], "a": adapters["a"]})


class _Interrupted:
    """A future that Ctrl-C hits while it is waited for."""

    def __init__(self, future: Any) -> None:
        self._future = future

    def __getattr__(self, name: str) -> Any:
        return getattr(self._future, name)

    def result(self, *_: Any) -> Any:
        raise KeyboardInterrupt


def test_pin_applies_to_adapter_that_replaces_its_name():
    of, _ = bank_with_adapters(4)
    held = of.borrow(["a", "b"])
    other = Adapter(9)
    pinning = threading.Thread(target=of.pin, args=("c",))
    pinning.start()
    while not of._find("c").waiters:
        pass
    adding = threading.Thread(target=of.add, args=("c", other))
    adding.start()
    adding.join(60)
    held.release()
    pinning.join(60)
    for name in ("a", "b", "d"):
        of.borrow([name]).release()
    assert [entry.name for entry in of._shelf.resident] == ["c", "d"]
    assert_lends(of, {"c": other})
    assert of.stats().leases == 1
    one = layout().nbytes(dict.fromkeys(SHAPES, 8))
    small, adapters = bank_with_adapters(2, device_bytes=2 * one)
    for name in adapters:
        small.pin(name)
    with pytest.raises(ValueError, match="'a' is pinned, and would not fit beside others"):
        small.add("a", Adapter(5, 16))
    assert_lends(small, adapters)


def test_lease_callback_may_call_the_bank():
    of, _ = bank_with_adapters(3)
    held, done = of.borrow(["a", "b"]), threading.Event()
    of.lease(["c"]).add_done_callback(
        lambda future: (future.result().release(), of.remove("c"), done.set())
    )
    held.release()
    assert done.wait(60)
    assert of.names == ("a", "b")


def test_bank_evicts_until_free_pages_are_contiguous():
    """A page wants one piece: as many leave as it takes to make it."""
    cpu = torch.device("cpu")
    shapes = {"small": (8, 8), "large": (80, 80)}
    of = AdapterBank(
        Layout({n: (N, K, cpu, torch.float32) for n, (N, K) in shapes.items()}, 8), 30,
        device_bytes=44 * 256,
    )  # fmt: skip
    names = [f"s{i}" for i in range(22)]
    for i, name in enumerate(names):
        factors = {"small": Factors(torch.full((8, 8), i + 1.0), torch.ones(8, 8), 1.0)}
        of.add(name, lambda factors=factors: factors)
    large = {"large": Factors(torch.ones(8, 80), torch.ones(80, 8), 1.0)}
    of.add("large", lambda: large)
    held = {name: of.borrow([name]) for name in names[1::2]}
    for name in names[::2]:
        of.remove(name)
    wants = of.lease(["large"])
    for _ in range(500):
        wait_until_settled(of)
        if wants.done():
            break
        for name in list(held):
            # Others ask for the same without end: a lease begins before the last one ends.
            again = of.lease([name])
            held.pop(name).release()
            if again.done():
                held[name] = again.result()
            else:
                again.cancel()
    wants.result(60).release()
    assert held  # and not all of them had to


def test_lease_refuses_string_instead_of_list():
    with pytest.raises(TypeError, match="adapter_names: expected a list of names, got 'ab'"):
        bank_with_adapters(2)[0].lease("ab")


def test_add_refuses_numbers_too_large_for_float16():
    of, big = AdapterBank(layout(dtype=torch.float16), 1), Adapter(1)
    big.factors["one"].lora_B[3, 2] = 7e4
    with pytest.raises(ValueError, match="one: lora_B holds numbers that"):
        of.add("a", big)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_forked_process_loads_adapters_by_itself():
    of, _ = bank_with_adapters(3)
    child = os.fork()
    if not child:
        of.lease(["c"]).result(30).release()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
