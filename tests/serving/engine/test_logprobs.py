"""Log-probabilities of events are the model's own, before temperature, top_k and top_p."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from fastlora import MultiLoRAModel
from fastlora.serving import Event, Request
from tests.support.models import llama
from tests.support.serving.streams import PATIENCE, ask, generate_alone, server_of


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> MultiLoRAModel:
    return server_of(llama, tmp_path_factory.mktemp("adapters"))


@pytest.mark.parametrize("sampled", [{}, {"do_sample": True, "temperature": 0.7, "top_k": 3}])
@pytest.mark.parametrize("count", [0, 4, 1000])
def test_event_logprobs_are_the_models_own(server, sampled, count):
    """Beside requests that ask for none, or for fewer."""
    asked = ask("one", 6, logprobs=count, seed=1, **sampled)
    others = [ask("two", 6), ask(None, 6, prompt=3, logprobs=1)]
    events: dict[int, list[Event]] = {}
    for event in server.stream([asked, *others], max_rows=4, max_length=32):
        events.setdefault(id(event.request), []).append(event)
    assert {(e.logprob, e.likeliest) for e in events[id(others[0])]} == {(None, ())}
    assert {len(e.likeliest) for e in events[id(others[1])]} == {1}
    tokens = [event.token for event in events[id(asked)]]
    whole = torch.tensor([[*asked.prompt, *tokens]])
    logits = server(whole, adapter_names=["one"]).logits[0, len(asked.prompt) - 1 : -1]
    wanted = logits.double().log_softmax(-1)
    for event, row in zip(events[id(asked)], wanted, strict=True):
        best = row.topk(min(count, len(row)))
        assert event.logprob == pytest.approx(float(row[event.token]), abs=1e-4)
        assert [logprob for _, logprob in event.likeliest] == pytest.approx(
            best.values.tolist(), abs=1e-4
        )
        assert all(row[i] == pytest.approx(w, abs=1e-4) for i, w in event.likeliest)


def test_request_refuses_logprobs_that_are_no_count():
    for value, kind in ((-1, ValueError), (True, TypeError), (1.5, TypeError)):
        with pytest.raises(kind, match="logprobs"):
            Request([1], logprobs=value)


def test_send_calls_emit_and_then_after_turn(server):
    """Once a turn, however many requests have had a token."""
    calls: list[str] = []
    requests = [ask(name, 5) for name in ("one", "two", None)]
    with server.engine(max_length=32, after_turn=lambda: calls.append("turn")) as engine:
        for request in requests:
            engine.send(request, lambda event: calls.append("event"))
        last = engine.submit(ask("three", 8))
        last.result(PATIENCE)
    assert calls.count("event") == 15
    assert 8 <= calls.count("turn") <= 16
    cancelled: list[Event] = []
    with server.engine(max_length=1000) as engine:
        cancel = engine.send(ask("one", 900), cancelled.append)
        cancel()
    assert cancelled[-1].finish_reason == "cancelled"
    assert len(cancelled) < 900


def test_adapter_from_a_source_is_read_again_when_it_is_needed(tmp_path):
    from fastlora.adapters import files

    served = server_of(llama, tmp_path)
    reads: list[str] = []

    def source(name: str):
        def read():
            reads.append(name)
            config = files.read_json(tmp_path / name / files.CONFIG_NAME)
            path = tmp_path / name / files.WEIGHTS_NAME
            from safetensors.torch import load_file

            return load_file(path), config

        return read

    from fastlora import MultiLoRAModel

    other = MultiLoRAModel(llama(), max_adapters=1, max_rank=4, host_bytes=0)
    for name in ("one", "two"):
        other.load_adapter_from_source(source(name), name)
    for name in ("one", "two", "one"):
        request = ask(name, 4)
        assert generate_alone(other, request) == generate_alone(served, request)
    assert reads.count("one") > 1
    with pytest.raises(ZeroDivisionError):
        other.load_adapter_from_source(lambda: 1 // 0, "three")
    assert other.adapters == ("one", "two")
