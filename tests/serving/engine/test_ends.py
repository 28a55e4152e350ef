"""A cancelled, dropped, late, bad or failed request ends alone, and engines end cleanly."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

import fastlora
from fastlora import MultiLoRAModel
from fastlora.serving import Request
from fastlora.serving.engine import engine as engines
from tests.support.models import VOCABULARY, llama, randomise_lora
from tests.support.serving.streams import (
    NAMES,
    PATIENCE,
    ask,
    gate_forwards,
    generate_alone,
    server_of,
)

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> MultiLoRAModel:
    server = server_of(llama, tmp_path_factory.mktemp("adapters"))
    server.engine(max_rows=1, max_length=8).close()  # what it tries of a model is tried now
    return server


def test_cancelled_request_leaves_other_requests_running(server):
    with server.engine(max_length=64, max_rows=2) as engine, gate_forwards(server, stop=5) as gate:
        left, stays = engine.submit(ask("one", new=40)), engine.submit(ask("two", new=12))
        waits = engine.submit(ask("three", new=5))
        gate.wait()
        left.cancel()
        gate.open()
        text = left.result(PATIENCE)
        assert left.finish_reason == "cancelled"
        assert len(text) == 6
        assert text == generate_alone(server, left.request)[: len(text)]
        assert list(left) == text
        for stream in (stays, waits):
            assert stream.result(PATIENCE) == generate_alone(server, stream.request)
        stays.cancel()  # what has ended stays as it is
        assert stays.finish_reason == "length"


def test_dropped_stream_cancels_its_request(server):
    with (
        server.engine(max_length=2000, max_rows=1) as engine,
        gate_forwards(server, stop=5) as gate,
    ):
        dropped = engine.submit(ask("one", new=1900))
        next(iter(dropped))
        gate.wait()
        del dropped
        gc.collect()
        gate.open()
        after = engine.submit(ask("two", new=3)).result(PATIENCE)
    assert after == generate_alone(server, ask("two", new=3))
    assert gate.sizes == [4, 1, 1, 1, 1, 1, 4, 1, 1]


def test_unread_stream_does_not_block_other_requests(server):
    with server.engine(max_length=40, max_rows=2) as engine:
        unread = engine.submit(ask("one", new=20))
        for _ in range(3):
            assert engine.submit(ask("two")).result(PATIENCE) == generate_alone(server, ask("two"))
        assert unread.result(PATIENCE) == generate_alone(server, unread.request)


@pytest.mark.parametrize("max_rows", [1, 4])
def test_request_ends_after_its_timeout(server, max_rows):
    """In the batch (which waits at the gate until it is late) and before, the others not."""
    with server.engine(max_length=64, max_rows=max_rows) as engine:
        with gate_forwards(server, stop=0) as gate:
            stays = engine.submit(ask("one", new=9))
            gate.wait()
            late = engine.submit(ask("two", new=40, timeout=0.01))
            threading.Event().wait(0.02)
            gate.open()
            assert late.result(PATIENCE) == []
            assert late.finish_reason == "timeout"
            assert stays.result(PATIENCE) == generate_alone(server, stays.request)
        with gate_forwards(server, stop=1) as gate:
            late = engine.submit(ask("two", new=40, timeout=PATIENCE))
            gate.wait()
            job = engine._loop.scheduler.running[0]
            job.deadline = 0.0
            gate.open()
            assert late.result(PATIENCE) == generate_alone(server, late.request)[:2]
            assert late.finish_reason == "timeout"


BAD = {
    "an unknown adapter": (lambda: ask("nobody"), ValueError, "adapter_names: no adapter 'nobody'"),
    "too long": (lambda: ask(new=30, prompt=11), ValueError, "max_new_tokens: .*max_length=40"),
    "no token": (
        lambda: Request([3, VOCABULARY]),
        ValueError,
        f"input_ids: expected tokens below {VOCABULARY}, got {VOCABULARY}",
    ),
    "no request": (lambda: [1, 2, 3], TypeError, "request: expected a Request, got list"),
}


@pytest.mark.parametrize("what", BAD)
def test_submit_refuses_bad_request_and_batch_goes_on(server, what):
    make, error, message = BAD[what]
    with server.engine(max_length=40) as engine, gate_forwards(server, stop=2) as gate:
        good = engine.submit(ask())
        gate.wait()
        with pytest.raises(error, match=message):
            engine.submit(make())
        gate.open()
        assert good.result(PATIENCE) == generate_alone(server, good.request)


def test_engine_accepts_request_of_exactly_max_length(server):
    request = ask(new=30, prompt=10)
    with server.engine(max_length=40) as engine:
        assert engine.submit(request).result(PATIENCE) == generate_alone(server, request)


def test_failing_forward_fails_only_requests_of_its_step(server):
    kept: list[weakref.ref[torch.Tensor]] = []

    def fail(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        if output.shape[-2] == 7:
            kept.append(weakref.ref(output))
            raise torch.OutOfMemoryError("no memory for so many tokens")

    handle = server.model.model.layers[1].mlp.register_forward_hook(fail)
    try:
        with (
            server.engine(max_length=40, max_rows=2) as engine,
            gate_forwards(server, stop=2) as gate,
        ):
            writer = engine.submit(ask("one", new=9))
            gate.wait()
            fatal, waits = engine.submit(ask("two", prompt=6)), engine.submit(ask("three"))
            gate.open()
            for stream in (writer, fatal):
                with pytest.raises(RuntimeError, match="OutOfMemoryError: no memory for so many"):
                    stream.result(PATIENCE)
                assert stream.finish_reason == "error"
                assert isinstance(stream.error.__cause__, torch.OutOfMemoryError)
            # In rows that had been written in part.
            assert waits.result(PATIENCE) == generate_alone(server, waits.request)
            for name in NAMES:
                assert engine.submit(ask(name)).result(PATIENCE) == generate_alone(
                    server, ask(name)
                )
        assert kept
        assert kept[0]() is None
    finally:
        handle.remove()
    assert writer.tokens == generate_alone(server, writer.request)[:3]


def test_adapter_with_nan_fails_only_its_requests(tmp_path):
    server = server_of(llama, tmp_path)
    config = fastlora.LoRAConfig(r=4, target_modules=["v_proj"])
    broken = randomise_lora(fastlora.replace_linear(llama(), config), float("nan"))
    fastlora.save_adapter(broken, tmp_path / "broken")
    server.load_adapter(tmp_path / "broken", "two")
    with server.engine(max_length=40, max_rows=2) as engine:
        # Longer than what comes to its row next, and would read what is left behind it.
        requests = [ask("one"), ask("two", prompt=17), ask("three"), ask("one")]
        streams = [engine.submit(request) for request in requests]
        sampled = engine.submit(ask("two", do_sample=True))
        for stream in (streams[1], sampled):
            with pytest.raises(RuntimeError, match="adapter_name: the logits with 'two' are not"):
                stream.result(PATIENCE)
        for stream in (streams[0], *streams[2:]):
            assert stream.result(PATIENCE) == generate_alone(server, stream.request)


def test_close_cancels_requests_and_frees_cache(server):
    engine = server.engine(max_length=512, max_rows=3)
    cache = engine._loop.runner.cache
    # Two layers, keys and values, rows, heads, positions, their size, four bytes.
    assert engine.cache_bytes == cache.nbytes == 2 * 2 * 3 * 2 * 512 * 8 * 4
    pools = [weakref.ref(pool) for pair in cache.layers.values() for pool in pair]
    with gate_forwards(server, stop=4) as gate:
        runs, waits = engine.submit(ask(new=400)), [engine.submit(ask()) for _ in range(4)]
        gate.wait()
        closer = threading.Thread(target=engine.close)
        closer.start()
        while not engine._loop._closed:
            threading.Event().wait(0.001)
        gate.open()
        closer.join(PATIENCE)
    assert runs.finish_reason == "cancelled"
    assert runs.tokens == generate_alone(server, runs.request)[:5]
    assert waits[-1].finish_reason == "cancelled"
    assert waits[-1].result() == []
    with pytest.raises(RuntimeError, match="request: the engine is closed"):
        engine.submit(ask())
    del cache
    gc.collect()
    assert [pool() for pool in pools] == [None] * 4
    engine.close()


def test_dropped_engine_stops_its_thread_and_frees_server(tmp_path):
    server = server_of(llama, tmp_path)
    text = server.engine(max_length=40).submit(ask()).result(PATIENCE)  # its stream holds it
    assert text == generate_alone(server, ask())
    engine = server.engine(max_length=40)
    engine.submit(ask()).result(PATIENCE)
    thread, held = engine._thread, weakref.ref(server)
    del engine
    gc.collect()
    thread.join(PATIENCE)
    assert not thread.is_alive()
    del server, thread
    gc.collect()
    assert held() is None


def test_engine_is_not_registered_when_thread_cannot_start(server, monkeypatch):
    def start(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    before = dict(engines._running)
    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(RuntimeError, match="can't start"):
        server.engine(max_rows=2, max_length=32)
    assert engines._running == before


def test_dropped_engine_does_not_abort_exiting_process():
    """Its thread is within a forward when the interpreter ends, and nobody holds the engine."""
    script = (
        "from fastlora.serving import Engine, Request\n"
        "from tests.support.models import llama\n"
        "import fastlora\n"
        "server = fastlora.MultiLoRAModel(llama(max_position_embeddings=512), 1, 4)\n"
        "engine = Engine(server, max_rows=4, max_length=400)\n"
        "stream = engine.submit(Request([1, 2, 3], None, max_new_tokens=390, eos_token_id=()))\n"
        "next(iter(stream))\n"
        "del stream, engine\n"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
