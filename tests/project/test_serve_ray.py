"""examples/serve_ray.py with two replicas answers with the tokens of generate."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager

import pytest

pytest.importorskip("transformers")
pytest.importorskip("fastapi", reason="FastAPI is not installed")
pytest.importorskip("ray", reason="Ray is not installed")

from tests.project.ray_server import (
    END,
    NAMES,
    NEW,
    PATIENCE,
    ROOM,
    ROOT,
    ROWS,
    SHORT,
    SLOTS,
    SPARE,
    TOKENIZER,
    Server,
    completion_request,
    processes_with,
    running_server,
    send,
    stop,
    wait_for,
)

# Starting Ray and two replicas takes half a minute; the engine that they serve has quick tests.
pytestmark = [pytest.mark.full, pytest.mark.shared_start]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running_server(tmp_path_factory.mktemp("served")) as server:
        yield server


@pytest.mark.parametrize("adapter", [*NAMES, None])
def test_completion_tokens_equal_those_of_generate(server, adapter):
    """One adapter after another, more of them than there are slots, and each of them again."""
    tokens, ended = server.expected(adapter)
    for _ in range(2):
        answer = server.greedy(adapter)
        assert (answer.status, answer.tokens, answer.ended) == (200, tokens, ended)
        assert answer.body["object"] == "text_completion"
        assert answer.body["usage"]["completion_tokens"] == len(tokens)
        assert answer.body["choices"][0]["text"] == TOKENIZER.decode(tokens)


def test_adapters_answer_differently_and_one_ends_early(server):
    """Or the other tests would say little."""
    answers = {name: server.expected(name) for name in [*NAMES, None]}
    assert len({tuple(tokens[:3]) for tokens, _ in answers.values()}) == len(answers)
    ends = {name: (len(tokens), why) for name, (tokens, why) in answers.items()}
    assert ends == dict.fromkeys(ends, (NEW, "length")) | {"carol": (SHORT, "stop")}


def test_concurrent_requests_get_tokens_of_their_adapter(server):
    """More requests than rows and adapters than slots, all under way together."""
    names = [*NAMES, None] * 3
    expected = {name: server.expected(name) for name in [*NAMES, None]}
    with ThreadPoolExecutor(len(names)) as threads:
        answers = [*threads.map(server.greedy, names)]
    assert [(a.tokens, a.ended) for a in answers] == [expected[name] for name in names]


def test_server_evicts_adapters_under_short_requests(server):
    """Short requests by turns: adapters are evicted all the time, and never are there too many."""
    names = NAMES * 24
    expected = {name: server.expected(name, new=1)[0] for name in NAMES}
    with ThreadPoolExecutor(2 * ROWS) as threads:
        answers = [*threads.map(lambda name: server.greedy(name, max_tokens=1), names)]
    assert [answer.body for answer in answers if answer.status != 200] == []
    assert [answer.tokens for answer in answers] == [expected[name] for name in names]

    def kept() -> list[str]:
        found = re.findall(r"loaded \w+, has (\d+)", server.log.read_text())
        return found if len(found) >= len(NAMES) else []

    assert max(map(int, wait_for(kept, server.log))) == SLOTS


def test_completion_accepts_text_or_token_prompts(server):
    prompt = "Süßes, oder …"
    ids = TOKENIZER(prompt)["input_ids"]
    tokens, _ = server.expected("bob", ids)
    assert server.greedy("bob", prompt=prompt).tokens == tokens
    assert server.greedy("bob", prompt=ids).tokens == tokens


@pytest.mark.parametrize("adapter", ["carol", "bob", None])
def test_streamed_completion_has_tokens_of_generate(server, adapter):
    tokens, ended = server.expected(adapter)
    with closing(server.connect()) as connection:
        send(connection, completion_request(adapter) | {"stream": True})
        response = connection.getresponse()
        assert response.status == 200
        assert response.getheader("Content-Type").startswith("text/event-stream")
        *events, done, nothing = response.read().decode().split("\n\n")
    assert (done, nothing) == ("data: [DONE]", "")
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    assert {(c["id"], c["object"], c["model"]) for c in chunks} == {
        (chunks[0]["id"], "text_completion", completion_request(adapter)["model"])
    }
    choices = [chunk["choices"][0] for chunk in chunks]
    assert [c["token_ids"] for c in choices] == [*([token] for token in tokens), []]
    assert [c["finish_reason"] for c in choices] == [None] * len(tokens) + [ended]
    assert "".join(c["text"] for c in choices) == TOKENIZER.decode(tokens)


def test_sampled_completion_follows_its_seed(server):
    def tokens(seed: int) -> list[int]:
        return server.greedy("bob", temperature=1.5, top_p=0.95, seed=seed).tokens

    assert tokens(1) == tokens(1)
    assert len({tuple(tokens(seed)) for seed in range(4)}) > 1


def test_models_endpoint_lists_base_and_adapters(server):
    with closing(server.connect()) as connection:
        connection.request("GET", "/v1/models")
        listed = json.loads(connection.getresponse().read())
    names = [*NAMES, *SPARE, "broken"]
    assert listed["object"] == "list"
    assert {card["id"] for card in listed["data"]} == {"small", *(f"small:{n}" for n in names)}


@pytest.mark.parametrize(
    "model",
    [f"small:{name}" for name in ("mallory", "", "..", "../adapters/bob", "bob/", "bob\0", "notes")]
    + ["large", "large:bob", "smallbob", "bob", "", ":bob", "small:" + "b" * 200],
)
def test_unknown_model_is_answered_with_404(server, model):
    answer = server.greedy(None, model=model)
    error = answer.body["error"]
    assert (answer.status, error["param"], error["code"]) == (404, "model", "model_not_found")
    assert repr(model) in error["message"]


BAD = {
    "max_tokens": [0, -1, "5", 2.5, True, ROOM],
    "temperature": [-0.1, 2.1, "hot"],
    "top_p": [0, 1.1],
    "seed": [-1, 0.5],
    "prompt": ["", [], [END + 1], [-1], [0.5], ["a", "b"], None, [[1]]],
    "stream": ["yes", 1],
    "n": [2],
    "model": [None, 1],
    "echo": [True],
    "stop": ["a"],
}


@pytest.mark.parametrize("field", BAD)
def test_bad_field_is_answered_with_400(server, field):
    for value in BAD[field]:
        answer = server.greedy("bob", **{field: value})
        error = answer.body["error"]
        assert (answer.status, error["type"]) == (400, "invalid_request_error"), value
        assert field in error["message"], value
    assert server.greedy("bob").tokens == server.expected("bob")[0]


def test_body_without_json_is_answered_with_400(server):
    answer = server.post("{")
    assert answer.status == 400
    assert "JSON" in answer.body["error"]["message"]


def test_unloadable_adapter_is_answered_with_500(server):
    answer = server.greedy("broken")
    assert (answer.status, answer.body["error"]["type"]) == (500, "server_error")
    assert str(ROOT) not in json.dumps(answer.body)
    assert server.greedy("dave").tokens == server.expected("dave")[0]


LONG = ROOM - 100  # tokens that take minutes


@contextmanager
def answering_replicas(
    server: Server, adapter: str | None, pauses: list[float]
) -> Iterator[list[str]]:
    """Where long answers come from: one more after each pause, all under way together."""
    with ExitStack() as stack:
        found = []
        for pause in pauses:
            time.sleep(pause)
            connection = stack.enter_context(closing(server.connect()))
            send(connection, completion_request(adapter) | {"max_tokens": LONG, "stream": True})
            found.append(connection.getresponse().getheader("X-Replica"))
        yield found


def test_both_replicas_answer_when_one_is_full(server):
    """One more request than a replica takes."""
    with answering_replicas(server, None, [0] * (2 * ROWS + 1)) as found:
        assert len(set(found)) == 2


def test_requests_of_adapter_stay_on_its_replica(server):
    """Though the other replica is idle.

    Serve learns a moment later who has loaded what: each try, with an adapter that nobody has
    loaded yet, gives it more time.
    """
    tries = []
    for name, pause in zip(SPARE[:4], (0.5, 2, 8, 32), strict=True):
        with answering_replicas(server, name, [0, pause, 0, 0, 0, 0]) as found:
            tries.append(found)
        if len(set(found)) == 1:
            return
    raise AssertionError(f"adapters wander: {tries}")


def count_cancelled_tokens(server: Server, name: str) -> int:
    """How many tokens a cancelled request had got, which its replica logs; 0 before it has."""
    found = re.findall(rf"{name}: (\d+) tokens, cancelled", server.log.read_text())
    return max(map(int, found), default=0)


def test_closed_stream_cancels_its_request(server):
    with closing(server.connect()) as connection:
        send(connection, completion_request(SPARE[4]) | {"max_tokens": LONG, "stream": True})
        response = connection.getresponse()
        assert response.readline().startswith(b"data: ")
        response.close()
    assert wait_for(lambda: count_cancelled_tokens(server, SPARE[4]), server.log) < LONG


def test_closed_connection_cancels_request_before_answer(server):
    """It may not have begun yet, and then leaves no trace: each try stays longer."""
    pauses = iter(range(1, PATIENCE))

    def leave() -> int:
        with closing(server.connect()) as connection:
            send(connection, completion_request(SPARE[5]) | {"max_tokens": LONG})
            time.sleep(next(pauses))
        return count_cancelled_tokens(server, SPARE[5])

    assert wait_for(leave, server.log) < LONG


def test_stopped_server_leaves_no_processes_or_files(server):
    """Last, since it ends the server."""
    assert processes_with(server.mark) or sys.platform != "linux"
    assert stop(server.process) == 0
    assert processes_with(server.mark) == []
    assert list(server.temporary.glob("fastlora-*")) == []
