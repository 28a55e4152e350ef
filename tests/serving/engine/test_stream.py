"""Streams take requests lazily and report late adapters and errors as events."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from fastlora import MultiLoRAModel
from fastlora.serving import Event, Request
from fastlora.serving.engine import engine
from tests.support.models import llama, tokens
from tests.support.serving.streams import (
    PATIENCE,
    gate_forwards,
    generate_alone,
    mixed_requests,
    server_of,
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> MultiLoRAModel:
    return server_of(llama, tmp_path_factory.mktemp("adapters"))


def texts(events: list[Event]) -> dict[int, list[int]]:
    """By request, its tokens, once it is seen that its last event and no other ends it."""
    found: dict[int, list[int]] = {}
    ended = set()
    for event in events:
        key = id(event.request)
        assert key not in ended
        if event.token is not None:
            found.setdefault(key, []).append(event.token)
        if event.finish_reason is not None:
            ended.add(key)
    assert ended == {id(event.request) for event in events}
    return found


@pytest.mark.parametrize("max_rows", [1, 2, 32])
def test_stream_gives_every_request_its_own_text(server, max_rows):
    requests = mixed_requests()
    events = list(server.stream(requests, max_rows=max_rows, max_length=40))
    found = texts(events)
    assert [found[id(r)] for r in requests] == [generate_alone(server, r) for r in requests]
    assert {e.finish_reason for e in events} == {None, "length"}
    if max_rows > 1:
        # Interleaved: one ends while another, which began before, goes on.
        order = [requests.index(e.request) for e in events]
        assert order != sorted(order)


def test_stream_takes_requests_only_when_rows_are_free(server):
    taken = []

    def endless() -> Iterator[Request]:
        for request in mixed_requests() * 100:
            taken.append(request)
            yield request

    events = server.stream(endless(), max_rows=2, max_length=40)
    ended = 0
    for event in events:
        ended += event.finish_reason is not None
        assert len(taken) <= ended + 4
        if ended == 3:
            break
    assert len(taken) >= 4
    events.close()


def test_closing_stream_iterator_stops_the_engine(server):
    events = server.stream(mixed_requests(), max_length=40)
    next(events)
    running = events.gi_frame.f_locals["engine"]
    events.close()
    assert not running._thread.is_alive()
    assert not running._loop.runner.cache.layers


def test_stream_raises_error_of_its_iterable(server):
    def failing() -> Iterator[Request]:
        yield from mixed_requests()[:2]
        raise OSError("no more requests")

    with pytest.raises(OSError, match="no more requests"):
        list(server.stream(failing(), max_length=40))


def test_stream_reports_bad_request_as_its_event(server):
    good = mixed_requests()
    bad: list[Any] = [
        Request([1], "nobody", max_new_tokens=3),
        Request([1] * 30, max_new_tokens=11),
        Request([10**6], max_new_tokens=3),
        "no request",
    ]
    mixture = [bad[0], good[0], bad[1], *good[1:], bad[2], bad[3]]
    events = list(server.stream(mixture, max_rows=2, max_length=40))
    found = texts(events)
    assert [found[id(r)] for r in good] == [generate_alone(server, r) for r in good]
    errors = [next(e for e in events if e.request is request) for request in bad]
    assert [e.finish_reason for e in errors] == ["error"] * 4
    assert [e.token for e in errors] == [None] * 4
    kinds = [type(e.error) for e in errors]
    assert kinds == [ValueError, ValueError, ValueError, TypeError]
    assert "nobody" in str(errors[0].error)
    assert "max_length=40" in str(errors[1].error)


class Lending:
    """A bank whose adapters come when a test says so, and which counts what comes back."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.late: dict[str, Future[Any]] = {}
        self.lent: list[Lease] = []
        self.own = engine.lease_adapter
        monkeypatch.setattr(engine, "lease_adapter", self.lend)

    def lend(self, server: MultiLoRAModel, name: str | None) -> Future[Any]:
        if name in self.late:
            return self.late[name]
        future: Future[Any] = Future()
        future.set_result(self.lease(server, name))
        return future

    def lease(self, server: MultiLoRAModel, name: str | None) -> Lease:
        self.lent.append(Lease(self.own(server, name).result().slots))
        return self.lent[-1]

    def assert_all_back(self) -> None:
        assert [lease.released for lease in self.lent] == [1] * len(self.lent)


class Lease:
    def __init__(self, slots: tuple[int, ...]) -> None:
        self.slots, self.released = slots, 0

    def release(self) -> None:
        self.released += 1


def ask(name: str | None, new: int = 5, **options: Any) -> Request:
    torch.manual_seed(3)
    return Request(tokens(6), name, max_new_tokens=new, eos_token_id=(), **options)


@pytest.mark.parametrize("max_rows", [1, 4])
def test_requests_do_not_wait_for_loading_adapters(server, monkeypatch, max_rows):
    lending = Lending(monkeypatch)
    lending.late["two"] = Future()
    with server.engine(max_rows=max_rows, max_length=40) as running:
        late = running.submit(ask("two"))
        for name in ("one", "three", None, "one"):
            assert running.submit(ask(name)).result(PATIENCE) == generate_alone(server, ask(name))
        assert late.tokens == []
        assert late.finish_reason is None
        lending.late["two"].set_result(lending.lease(server, "two"))
        assert late.result(PATIENCE) == generate_alone(server, ask("two"))
    lending.assert_all_back()
    assert len(lending.lent) == 5


def test_unreadable_adapter_fails_only_its_requests(server, monkeypatch):
    lending = Lending(monkeypatch)
    lending.late["two"] = Future()
    with server.engine(max_rows=2, max_length=40) as running, gate_forwards(server, stop=2) as gate:
        good, bad = running.submit(ask("one", new=9)), running.submit(ask("two"))
        gate.wait()
        lending.late["two"].set_exception(OSError("adapter_model.safetensors: corrupt"))
        gate.open()
        with pytest.raises(OSError, match="corrupt"):
            bad.result(PATIENCE)
        with pytest.raises(OSError, match="corrupt"):
            list(bad)
        assert (bad.finish_reason, bad.tokens) == ("error", [])
        assert good.result(PATIENCE) == generate_alone(server, good.request)
    lending.assert_all_back()


def test_every_ended_request_releases_its_adapter(server, monkeypatch):
    lending = Lending(monkeypatch)
    lending.late["two"] = waited = Future()
    with server.engine(max_rows=2, max_length=64) as running, gate_forwards(server, stop=2) as gate:
        runs = [running.submit(ask(name, new=40)) for name in ("one", "three")]
        queued = [running.submit(ask("one")) for _ in range(2)]
        gate.wait()
        nobody = running.submit(ask("two"))
        late = running.submit(ask("one", timeout=1e-3))
        for stream in (runs[0], queued[0], nobody):
            stream.cancel()
        gate.open()
        assert nobody.result(PATIENCE) == late.result(PATIENCE) == []
        assert waited.cancelled()
        assert late.finish_reason == "timeout"
        assert queued[1].result(PATIENCE) == generate_alone(server, queued[1].request)
    assert runs[1].finish_reason in ("cancelled", "length")
    lending.assert_all_back()
    assert len(lending.lent) == 5


def test_lease_that_comes_after_cancel_is_released(server, monkeypatch):
    """Its future can no more be cancelled when its request is."""
    lending = Lending(monkeypatch)
    lending.late["two"] = waited = Future()
    waited.set_running_or_notify_cancel()
    with server.engine(max_length=40) as running:
        stream = running.submit(ask("two"))
        stream.cancel()
        assert stream.result(PATIENCE) == []
        waited.set_result(lending.lease(server, "two"))
    lending.assert_all_back()


WRONG = [
    ({"input_ids": []}, ValueError, "input_ids: expected at least one token"),
    ({"input_ids": "text"}, TypeError, "input_ids: expected token ids, got str"),
    ({"input_ids": [1.5]}, TypeError, "input_ids: expected a whole number, got 1.5"),
    ({"input_ids": [-1]}, ValueError, "input_ids: .*at least 0, got -1"),
    ({"input_ids": torch.ones(2)}, TypeError, "input_ids: .*got a tensor of torch.float32"),
    ({"input_ids": tokens(2, 3)}, ValueError, r"input_ids: expected shape .*got \(2, 3\)"),
    ({"adapter_name": 3}, TypeError, "adapter_name: expected a name or None, got 3"),
    ({"max_new_tokens": 0}, ValueError, "max_new_tokens: .*at least 1, got 0"),
    ({"max_new_tokens": 2.0}, TypeError, "max_new_tokens: .*got 2.0"),
    ({"scale": float("inf")}, ValueError, "scale: expected a finite number, got inf"),
    ({"scale": "1"}, TypeError, "scale: expected a number, got '1'"),
    ({"do_sample": 1}, TypeError, "do_sample: expected a bool, got 1"),
    ({"temperature": 0}, ValueError, "temperature: expected a number above 0, got 0"),
    ({"temperature": 1e-300}, ValueError, "temperature: expected at least 1e-06"),
    ({"top_k": -1}, ValueError, "top_k: .*at least 0, got -1"),
    ({"top_p": 1.5}, ValueError, r"top_p: expected a probability in \(0, 1\], got 1.5"),
    ({"top_p": 0.0}, ValueError, "top_p: expected a number above 0, got 0.0"),
    ({"seed": -2}, ValueError, "seed: .*at least 0, got -2"),
    ({"eos_token_id": 2.5}, TypeError, "eos_token_id: expected token ids, got float"),
    ({"eos_token_id": [None]}, TypeError, "eos_token_id: expected a whole number, got None"),
    ({"timeout": 0}, ValueError, "timeout: expected a number above 0, got 0"),
]


@pytest.mark.parametrize("fields, error, message", WRONG)
def test_request_refuses_invalid_fields(fields, error, message):
    with pytest.raises(error, match=message):
        Request(**{"input_ids": [1, 2]} | fields)


def test_request_accepts_ids_as_tensor_or_list():
    ids = tokens(1, 4)
    kept = tuple(ids[0].tolist())
    for given in (ids, ids[0], ids.int(), list(kept), kept):
        assert Request(given).input_ids == kept
    assert Request([1], eos_token_id=7).eos == {7}
    assert Request([1], eos_token_id=()).eos == set()
    assert Request([1]).eos is None


def test_result_raises_timeout_error_while_request_goes_on(server):
    with server.engine(max_length=40) as running, gate_forwards(server, stop=0) as gate:
        stream = running.submit(ask("one"))
        with pytest.raises(TimeoutError, match=r"timeout: the request goes on after 0.01 s"):
            stream.result(0.01)
        gate.open()
        assert stream.result(PATIENCE) == generate_alone(server, ask("one"))
