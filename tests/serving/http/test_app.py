"""Completions, chats and models over a real connection: tokens are those of each adapter alone."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import pytest

from tests.support.serving.http_server import (
    NAMES,
    PATIENCE,
    PROMPT,
    TEMPLATE,
    completion,
    tokenizer,
)


def decode(tokens: list[int]) -> str:
    return tokenizer().decode(tokens)


@pytest.mark.parametrize("adapter", [*NAMES, None])
@pytest.mark.parametrize("long", [False, True])
def test_completion_has_tokens_of_its_adapter_alone(running, adapter, long):
    model = "tiny" if adapter is None else f"tiny:{adapter}" if long else adapter
    answer = running.complete(model)
    tokens = running.expected(adapter, PROMPT, 8)
    assert answer.status == 200, answer.text
    choice = answer.body["choices"][0]
    assert (choice["token_ids"], choice["finish_reason"]) == (tokens, "length")
    assert choice["text"] == decode(tokens)
    assert answer.body["model"] == model
    counted = {"prompt_tokens": len(PROMPT), "completion_tokens": 8}
    assert answer.body["usage"] == counted | {"total_tokens": len(PROMPT) + 8}


def test_concurrent_requests_get_tokens_of_their_adapter(running):
    """More requests than rows and adapters than slots, streamed and not."""
    names = [*NAMES, None] * 4
    expected = {name: running.expected(name, PROMPT, 8) for name in [*NAMES, None]}

    def ask(number: int) -> list[int]:
        answer = running.complete(names[number] or "tiny", stream=bool(number % 2))
        bodies = answer.events if number % 2 else [answer.body]
        return [token for body in bodies for token in body["choices"][0]["token_ids"]]

    with ThreadPoolExecutor(len(names)) as threads:
        found = [*threads.map(ask, range(len(names)))]
    assert found == [expected[name] for name in names]


def test_text_prompt_is_that_of_its_tokens(running):
    prompt = "Süßes, oder …"
    asked = running.complete("bob", prompt=prompt).body["choices"][0]["token_ids"]
    assert asked == running.expected("bob", tokenizer()(prompt)["input_ids"], 8)


def test_stream_has_usage_last_where_it_is_asked_for(running):
    options = {"stream": True, "stream_options": {"include_usage": True}}
    answer = running.complete("alice", **options)
    assert answer.headers["content-type"].startswith("text/event-stream")
    *events, last = answer.events
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 8
    assert {event["usage"] for event in events} == {None}
    assert {(event["id"], event["object"]) for event in [*events, last]} == {
        (last["id"], "text_completion")
    }
    assert events[-1]["choices"][0]["finish_reason"] == "length"
    text = "".join(event["choices"][0]["text"] for event in events)
    assert text == decode(running.expected("alice", PROMPT, 8))
    assert "usage" not in running.complete("alice", stream=True).events[0]


def test_chat_prompt_is_the_models_own_template(running):
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "Hi"}]
    body = {"model": "carol", "messages": messages, "max_tokens": 6, "temperature": 0}
    ids = tokenizer()("<system>S<user>Hi<assistant>")["input_ids"]
    tokens = running.expected("carol", ids, 6)
    whole = running.ask("/v1/chat/completions", body).body
    assert whole["object"] == "chat.completion"
    assert whole["choices"][0]["message"]["content"] == decode(tokens)
    events = running.ask("/v1/chat/completions", body | {"stream": True}).events
    deltas = [event["choices"][0]["delta"] for event in events]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta.get("content", "") for delta in deltas) == decode(tokens)
    assert TEMPLATE  # the one that the tokenizer has


def test_chat_that_the_template_refuses_is_answered_with_400(running):
    body = {"model": "tiny", "messages": [{"role": "developer", "content": "x"}]}
    answer = running.ask("/v1/chat/completions", body)
    assert (answer.status, answer.error["param"]) == (400, "messages")
    assert "no developers" in answer.error["message"]


def test_openai_client_completes_chats_streams_and_lists(running):
    openai = pytest.importorskip("openai")
    url = f"http://127.0.0.1:{running.port}/v1"
    tokens = running.expected("bob", PROMPT, 5)
    messages: Any = [{"role": "user", "content": "Hi"}]
    said = running.expected("bob", tokenizer()("<user>Hi<assistant>")["input_ids"], 5)
    settings: Any = {"model": "bob", "max_tokens": 5, "temperature": 0}
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        whole = client.completions.create(prompt=PROMPT, **settings)
        assert whole.choices[0].text == decode(tokens)
        with client.completions.create(prompt=PROMPT, stream=True, **settings) as stream:
            assert "".join(event.choices[0].text for event in stream) == decode(tokens)
        chat = client.chat.completions.create(messages=messages, logprobs=True, **settings)
        assert chat.choices[0].message.content == decode(said)
        assert len(chat.choices[0].logprobs.content) == 5
        with client.chat.completions.create(messages=messages, stream=True, **settings) as stream:
            texts = [event.choices[0].delta.content or "" for event in stream]
        assert "".join(texts) == decode(said)
        assert {"tiny", *NAMES} <= {model.id for model in client.models.list()}
        with pytest.raises(openai.NotFoundError, match="there is no 'nobody'"):
            client.completions.create(prompt="x", model="nobody")


def test_choices_with_seed_differ_and_repeat(running):
    fields = {"n": 3, "seed": 5, "temperature": 1.5}

    def ask(**more: Any) -> list[list[int]]:
        choices = running.complete("alice", **fields | more).body["choices"]
        return [choice["token_ids"] for choice in choices]

    texts = ask()
    assert len({tuple(text) for text in texts}) == 3
    assert ask() == texts
    assert ask(n=1) == texts[:1]
    events = running.complete("alice", **fields, stream=True).events
    streamed: list[list[int]] = [[], [], []]
    for event in events:
        for choice in event["choices"]:
            streamed[choice["index"]] += choice["token_ids"]
    assert streamed == texts


def test_stop_string_across_tokens_ends_the_text_before_it(running):
    """Every token is a byte, so that a string of two characters lies in two tokens at least."""
    tokens = running.expected("alice", PROMPT, 24)
    text = decode(tokens)
    at = next(i for i in range(4, 20) if text.find(text[i : i + 3]) == i)
    stop = text[at : at + 3]
    for stream in (False, True):
        answer = running.complete("alice", max_tokens=500, stop=[stop, "absent"], stream=stream)
        choices = [body["choices"][0] for body in (answer.events if stream else [answer.body])]
        assert "".join(choice["text"] for choice in choices) == text[:at]
        assert choices[-1]["finish_reason"] == "stop"
    wait_until(lambda: running.service.limits.total == 0)


def test_logprobs_are_those_of_the_tokens(running):
    answer = running.complete("bob", logprobs=3, max_tokens=4).body["choices"][0]
    logprobs, tokens = answer["logprobs"], answer["token_ids"]
    assert logprobs["tokens"] == [decode([token]) for token in tokens]
    assert all(len(top) in (1, 2, 3) for top in logprobs["top_logprobs"])
    best = [max(top.values()) for top in logprobs["top_logprobs"]]
    assert logprobs["token_logprobs"] == best  # greedy
    assert all(-10 < logprob <= 0 for logprob in best)


BAD = {
    "max_tokens": [0, -1, "5", 2.5, True, 5000],
    "temperature": [-0.1, 2.1, "hot"],
    "top_p": [0, 1.1],
    "top_k": [-1],
    "seed": [-1, 0.5],
    "prompt": ["", [], [10**6], [-1], [0.5], ["a", "b"], None, [[1]], "x" * 3000],
    "stream": ["yes", 1],
    "n": [0, 9, "2"],
    "model": [None, 1],
    "echo": [True],
    "stop": [[""], ["a"] * 5, "x" * 300, 1],
    "logprobs": [-1, 21, True],
    "stream_options": [{"include_usage": True}],
    "tools": [[{}]],
    "user": ["me"],
}


@pytest.mark.parametrize("field", BAD)
def test_bad_field_is_answered_with_400_and_its_name(running, field):
    for value in BAD[field]:
        answer = running.ask("/v1/completions", completion("bob") | {field: value})
        assert (answer.status, answer.error["type"]) == (400, "invalid_request_error"), value
        assert field in answer.error["message"], value


@pytest.mark.parametrize("field", ["chat_template", "response_format", "tools"])
def test_unsupported_field_of_chat_is_refused_by_name(running, field):
    body = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], field: ["x"]}
    answer = running.ask("/v1/chat/completions", body)
    assert (answer.status, field in answer.error["message"]) == (400, True)


def test_bad_bodies_are_refused(running):
    path = "/v1/completions"
    for body in ("{", "[]", "", "null", b"\xff", "[" * 100_000):
        assert running.ask(path, body).status == 400, body[:9]
    assert running.ask(path, "{}", Content_Type="text/plain").status == 415
    # Its length alone is enough; whoever still sends finds the connection closed.
    assert running.ask(path, "{}", Content_Length=str((1 << 20) + 1)).status == 413
    assert running.ask(path, method="GET").status == 405
    assert running.ask("/v1/nothing").error["message"] == "Not Found"


@pytest.mark.parametrize(
    "model", ["nobody", "tiny:nobody", "linked", "notes", "../alice", "x" * 999]
)
def test_unknown_adapter_is_answered_with_404(running, model):
    answer = running.complete(model)
    assert (answer.status, answer.error["code"]) == (404, "model_not_found")


def test_broken_adapter_fails_alone_with_its_reason(running):
    answer = running.complete("broken")
    assert (answer.status, answer.error["type"]) == (500, "server_error")
    assert "'broken' cannot be loaded: adapter_model.safetensors" in answer.error["message"]
    assert str(running.folder) not in answer.text
    assert running.complete("alice").status == 200


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "", "localhost:80:80"])
def test_request_for_another_host_is_refused(running, host):
    assert running.ask("/v1/models", Host=host).status == 421


def test_right_hosts_are_served_without_cors(running):
    for host in ("localhost", "LOCALHOST:123", "[::1]:8000", "127.0.0.1"):
        answer = running.ask("/v1/models", Host=host, Origin="http://evil.example")
        assert answer.status == 200
        assert not [name for name in answer.headers if name.startswith("access-control")]
    preflight = {"Origin": "http://evil.example", "Access_Control_Request_Method": "POST"}
    assert running.ask("/v1/completions", method="OPTIONS", **preflight).status == 405


def test_models_lists_base_and_adapters(running):
    names = [card["id"] for card in running.ask("/v1/models").body["data"]]
    assert names == ["tiny", "alice", "bob", "broken", "carol"]
    assert running.ask("/v1/models/bob").body["parent"] == "tiny"
    assert running.ask("/v1/models/nobody").status == 404


def test_health_and_metrics_name_no_adapter(running):
    assert running.ask("/health").status == 200
    running.complete("alice")
    text = running.ask("/metrics").text
    assert "fastlora_written_tokens_total" in text
    assert 'fastlora_http_responses_total{status="200"}' in text
    assert not [name for name in NAMES if name in text]


def test_admin_without_its_key_is_refused(running):
    body = {"lora_name": "x", "lora_path": "alice"}
    assert running.ask("/v1/load_lora_adapter", body).status == 403
    assert running.ask("/v1/unload_lora_adapter", {"lora_name": "alice"}).status == 403


def wait_until(ready: Any) -> None:
    deadline = time.monotonic() + PATIENCE
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("stream", [False, True])
def test_client_that_leaves_ends_its_requests(running, stream):
    body = completion("alice", max_tokens=900, stream=stream, n=4)
    with closing(running.connect()) as connection:
        data = json.dumps(body)
        connection.request("POST", "/v1/completions", data, {"Content-Type": "application/json"})
        if stream:
            connection.getresponse().readline()
        wait_until(lambda: running.service.limits.total == 4)
        before = written(running)
    wait_until(lambda: running.service.limits.total == 0)
    assert written(running) - before < 4 * 800
    wait_until(lambda: not running.service.engine._loop.scheduler.running)


def written(running: Any) -> float:
    return running.service.metrics.written_tokens._value.get()


def test_log_has_no_prompt_when_something_fails(running, monkeypatch, caplog):
    def fail(*_: Any) -> None:
        raise ZeroDivisionError("secret prompt")

    monkeypatch.setattr(running.service, "answer", fail)
    answer = running.complete("alice", prompt="secret prompt")
    assert answer.status == 500
    assert "secret" not in answer.text + caplog.text
    assert "ZeroDivisionError" in caplog.text
