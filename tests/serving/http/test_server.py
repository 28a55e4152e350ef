"""A signal lets running answers finish for a while and ends the process with exit code 0."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from fastlora.commands.main import main
from tests.support.serving.http_server import (
    PATIENCE,
    PROMPT,
    base,
    completion,
    running,
    tokenizer,
)

ROOT = Path(__file__).resolve().parents[3]


def begin(server: Any, **fields: Any) -> Any:
    """A stream that has begun."""
    connection = server.connect()
    data = json.dumps(completion("alice", stream=True, **fields))
    connection.request("POST", "/v1/completions", data, {"Content-Type": "application/json"})
    response = connection.getresponse()
    assert response.readline().startswith(b"data: ")
    return connection, response


def test_stop_lets_streams_finish_and_refuses_new_requests(adapters):
    with running(adapters) as server:
        connection, response = begin(server, max_tokens=400)
        with closing(connection):
            server.server.stop()
            deadline = time.monotonic() + PATIENCE
            while not server.service.stopping:
                assert time.monotonic() < deadline
            refused = server.complete("alice")
            assert (refused.status, server.ask("/health").status) == (503, 503)
            assert response.read().endswith(b"data: [DONE]\n\n")
    assert not server.service.engine._thread.is_alive()


def test_stop_cancels_streams_after_the_grace(adapters):
    with running(adapters, grace=0.1, length=4096) as server:
        connection, response = begin(server, max_tokens=4000)
        with closing(connection):
            server.server.stop()
            last = response.read().strip().split(b"\n\n")[-1]
    assert json.loads(last.removeprefix(b"data: "))["error"]["message"] == "the server is stopping"


def test_stopped_server_leaves_no_threads_or_handles(adapters):
    with running(adapters) as server:  # what the first one imports stays
        server.complete("alice")
    threads, handles = set(threading.enumerate()), len(os.listdir("/proc/self/fd"))
    with running(adapters) as server:
        server.complete("alice", prompt="x" * 9000)
        server.complete("bob")
        running_threads = set(threading.enumerate()) - threads
        assert {thread.name for thread in running_threads} >= {"served", "fastlora-engine"}
    left = [t for t in set(threading.enumerate()) - threads if t.name != "fastlora-adapters"]
    assert left == []  # the bank's thread ends with its bank
    assert len(os.listdir("/proc/self/fd")) == handles


def test_answer_that_takes_too_long_is_ended(adapters):
    with running(adapters, seconds=0.3, length=4096) as server:
        whole = server.complete("alice", max_tokens=4000)
        assert whole.status == 504
        assert "longer than 0.3 s" in whole.error["message"]
        streamed = server.complete("alice", max_tokens=4000, stream=True)
        assert "longer than 0.3 s" in streamed.text.split("\n\n")[-2]


def test_full_server_refuses_with_429_and_serves_again(adapters):
    with running(adapters, under_way=2, rows=1) as server:
        streams = [begin(server, max_tokens=200)]
        with ThreadPoolExecutor(1) as threads:
            waiting = threads.submit(server.complete, "bob")
            while server.service.limits.total < 2:
                pass
            refused = server.complete("carol")
            assert (refused.status, int(refused.headers["retry-after"]) >= 1) == (429, True)
            streams[0][1].read()
            streams[0][0].close()
            assert waiting.result().status == 200
        assert server.complete("carol").status == 200


def test_slow_body_is_given_up(adapters):
    with running(adapters, body_seconds=0.2) as server, closing(server.connect()) as connection:
        connection.putrequest("POST", "/v1/completions")
        connection.putheader("Content-Type", "application/json")
        connection.putheader("Content-Length", "100")
        connection.endheaders(b"{")
        assert connection.getresponse().status == 408


def test_chunked_body_is_counted_while_it_is_read(adapters):
    """No length is known beforehand, and the last piece never comes."""
    with running(adapters, body_bytes=1000) as server, closing(server.connect()) as connection:
        connection.putrequest("POST", "/v1/completions")
        connection.putheader("Content-Type", "application/json")
        connection.putheader("Transfer-Encoding", "chunked")
        connection.endheaders()
        connection.send(b"1f4\r\n" + b"x" * 500 + b"\r\n")
        connection.send(b"1f5\r\n" + b"x" * 501 + b"\r\n")
        assert connection.getresponse().status == 413


def save_model(folder: Path) -> Path:
    model = base()
    model.save_pretrained(folder / "small")
    tokenizer().save_pretrained(folder / "small")
    return folder / "small"


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.full)]
)
def test_serve_command_answers_and_ends_with_zero(adapters, running, tmp_path, number):
    """The whole command, in a process of its own."""
    command = [sys.executable, "-m", "fastlora", "serve", save_model(tmp_path), "--port=0"]
    command += [f"--adapters={adapters}", "--name=tiny", "--max-length=128", "--max-rank=4"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*map(str, command)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        said = process.stdout.readline()
        ready = re.fullmatch(r"tiny is served at http://127\.0\.0\.1:(\d+)/v1\n", said)
        assert ready, said
        answer = running._replace(port=int(ready[1])).complete("alice")
        assert answer.body["choices"][0]["token_ids"] == running.expected("alice", PROMPT, 8)
        process.send_signal(number)
        out, errors = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    assert (process.returncode, out) == (0, "")
    assert "Traceback" not in errors


def test_serve_command_refuses_in_a_line(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("FASTLORA_API_KEY", raising=False)

    def refusal(*arguments: object) -> str:
        assert main(["serve", *map(str, arguments)]) == 2
        said = capsys.readouterr().err
        assert said.startswith("fastlora serve: ")
        assert said.count("\n") == 1
        return said

    assert "expected keys" in refusal(tmp_path, "--host=0.0.0.0", "--port=0")
    assert "expected a model's folder" in refusal(tmp_path / "absent", "--port=0")
    assert "keys" in refusal(tmp_path, "--keys", tmp_path / "keys", "--port=0")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert 'pip install "fastlora-kernels[serve]"' in refusal(tmp_path)
