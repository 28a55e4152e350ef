"""Engine: every request gets what it gets alone, whoever joins, leaves, fails or is cancelled."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

import fastlora
from fastlora import MultiLoRAModel, dispatch, invariance
from fastlora.serving import Engine, Request
from tests.models import (
    VOCABULARY,
    bert,
    gemma2,
    gpt2,
    llama,
    mistral,
    qwen2,
    randomise_lora,
    t5,
    tokens,
)
from tests.streams import NAMES, PATIENCE, alone, gated, mixed, server_of

BUILDS = {
    "llama": llama,
    "eager": lambda: llama(attn_implementation="eager"),
    "qwen2": qwen2,
    "mistral": mistral,
    "gpt2": lambda: gpt2(n_positions=64),
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> MultiLoRAModel:
    server = server_of(llama, tmp_path_factory.mktemp("adapters"))
    server.engine(max_rows=1, max_length=8).close()  # what it tries of a model is tried now
    return server


def ask(adapter_name: str | None = "one", new: int = 6, prompt: int = 4, **options) -> Request:
    torch.manual_seed(prompt)
    return Request(
        tokens(prompt), adapter_name, max_new_tokens=new, **{"eos_token_id": ()} | options
    )


@pytest.mark.parametrize("step_tokens", [4, 512])
@pytest.mark.parametrize("max_rows", [1, 3, 16])
@pytest.mark.parametrize("kind", BUILDS)
def test_requests_that_join_and_leave_write_what_they_write_alone(
    kind, max_rows, step_tokens, tmp_path
):
    server = server_of(BUILDS[kind], tmp_path)
    requests = mixed()
    expected = [alone(server, request) for request in requests]
    with server.engine(max_rows=max_rows, max_length=40, step_tokens=step_tokens) as engine:
        first = engine.submit(requests[0])
        read = iter(first)
        begun = [next(read), next(read)]  # the others join while it writes
        streams = [first, *map(engine.submit, requests[1:])]
        got = [stream.result(PATIENCE) for stream in streams]
    assert got == expected
    assert begun == expected[0][:2]
    assert [*begun, *read] == expected[0]
    assert [stream.finish_reason for stream in streams] == ["length"] * len(streams)


def test_adapters_write_different_texts(server):
    """Or nothing above would be shown."""
    texts = [alone(server, ask(name, new=8)) for name in (None, *NAMES)]
    assert len({tuple(text) for text in texts}) == len(texts)


def test_a_text_ends_with_its_eos(server):
    request = ask(new=20)
    text = alone(server, request)
    eos = text[6]
    cut = text[: text.index(eos) + 1]
    with server.engine(max_length=40) as engine:
        asked = engine.submit(ask(new=20, eos_token_id=[eos, VOCABULARY + 5]))
        assert (asked.result(PATIENCE), asked.finish_reason) == (cut, "eos")
        # Of a text that ends by both, the eos is what is said.
        both = engine.submit(ask(new=len(cut), eos_token_id=eos))
        assert (both.result(PATIENCE), both.finish_reason) == (cut, "eos")
    server.model.generation_config.eos_token_id = eos
    try:
        with server.engine(max_length=40) as engine:
            default = engine.submit(ask(new=20, eos_token_id=None))
            none = engine.submit(request)
            assert default.result(PATIENCE) == cut
            assert none.result(PATIENCE) == text
    finally:
        server.model.generation_config.eos_token_id = None


def test_a_scale_is_its_requests_own(server):
    scales = [0.5, 1.0, -1.0, 0.0]
    requests = [ask("two", new=10, scale=scale) for scale in scales]
    expected = [alone(server, r, adapter_scales=[r.scale]) for r in requests]
    with server.engine(max_length=40) as engine:
        streams = [engine.submit(request) for request in requests]
        got = [stream.result(PATIENCE) for stream in streams]
    assert got == expected
    assert got[3] == alone(server, ask(None, new=10))
    assert len({tuple(text) for text in got}) == 4


def test_a_token_is_computed_once(server):
    """Joining costs the joiner's prompt, and nothing of the others again."""
    requests = mixed()
    with server.engine(max_length=40, max_rows=3) as engine, gated(server) as gate:
        for stream in [engine.submit(request) for request in requests]:
            stream.result(PATIENCE)
    # The last token of each is written, not read.
    assert sum(gate.sizes) == sum(request.length - 1 for request in requests)


def test_one_forward_a_step_whatever_the_number_of_adapters(server):
    for names in [["one"] * 4, ["one", None, "two", "three"]]:
        with server.engine(max_length=40) as engine, gated(server, stop=0) as gate:
            streams = [engine.submit(ask(None, new=1))]
            gate.wait()
            streams += [engine.submit(ask(name, new=5)) for name in names]
            gate.open()
            for stream in streams:
                stream.result(PATIENCE)
        assert gate.sizes == [4, 16, 4, 4, 4, 4]


def test_a_long_prompt_is_read_in_parts_beside_who_writes(server):
    with server.engine(max_length=64, step_tokens=8) as engine, gated(server, stop=2) as gate:
        writer = engine.submit(ask("one", new=20))
        gate.wait()
        reader = engine.submit(ask("two", new=2, prompt=50))
        gate.open()
        assert reader.result(PATIENCE) == alone(server, reader.request)
        assert writer.result(PATIENCE) == alone(server, writer.request)
    # 4 of the writer's prompt, it alone, then both: 7 of the prompt of 50 beside each token.
    assert gate.sizes[:3] == [4, 1, 1]
    assert gate.sizes[3:11] == [8] * 7 + [2]


def test_step_tokens_that_writers_exceed(server):
    """Every writer goes on, and prompts get on by a token."""
    requests = [ask(name, new=6, prompt=2) for name in (None, *NAMES)]
    with server.engine(max_length=32, step_tokens=1) as engine, gated(server) as gate:
        streams = [engine.submit(request) for request in requests]
        got = [stream.result(PATIENCE) for stream in streams]
    assert got == [alone(server, request) for request in requests]
    assert max(gate.sizes) <= len(requests) + 1


def test_a_cancelled_request_leaves_the_others_alone(server):
    with server.engine(max_length=64, max_rows=2) as engine, gated(server, stop=5) as gate:
        left, stays = engine.submit(ask("one", new=40)), engine.submit(ask("two", new=12))
        waits = engine.submit(ask("three", new=5))
        gate.wait()
        left.cancel()
        gate.open()
        text = left.result(PATIENCE)
        assert left.finish_reason == "cancelled"
        assert len(text) == 6
        assert text == alone(server, left.request)[: len(text)]
        assert list(left) == text
        for stream in (stays, waits):
            assert stream.result(PATIENCE) == alone(server, stream.request)
        stays.cancel()  # what has ended stays as it is
        assert stays.finish_reason == "length"


def test_a_stream_that_is_dropped_cancels_its_request(server):
    with server.engine(max_length=2000, max_rows=1) as engine, gated(server, stop=5) as gate:
        dropped = engine.submit(ask("one", new=1900))
        next(iter(dropped))
        gate.wait()
        del dropped
        gc.collect()
        gate.open()
        after = engine.submit(ask("two", new=3)).result(PATIENCE)
    assert after == alone(server, ask("two", new=3))
    assert gate.sizes == [4, 1, 1, 1, 1, 1, 4, 1, 1]


def test_nobody_waits_for_a_reader(server):
    with server.engine(max_length=40, max_rows=2) as engine:
        unread = engine.submit(ask("one", new=20))
        for _ in range(3):
            assert engine.submit(ask("two")).result(PATIENCE) == alone(server, ask("two"))
        assert unread.result(PATIENCE) == alone(server, unread.request)


@pytest.mark.parametrize("max_rows", [1, 4])
def test_a_request_ends_when_its_time_is_over(server, max_rows):
    """In the batch (which waits at the gate until it is late) and before, the others not."""
    with server.engine(max_length=64, max_rows=max_rows) as engine:
        with gated(server, stop=0) as gate:
            stays = engine.submit(ask("one", new=9))
            gate.wait()
            late = engine.submit(ask("two", new=40, timeout=0.01))
            threading.Event().wait(0.02)
            gate.open()
            assert late.result(PATIENCE) == []
            assert late.finish_reason == "timeout"
            assert stays.result(PATIENCE) == alone(server, stays.request)
        with gated(server, stop=1) as gate:
            late = engine.submit(ask("two", new=40, timeout=PATIENCE))
            gate.wait()
            job = engine._loop.scheduler.running[0]
            job.deadline = 0.0
            gate.open()
            assert late.result(PATIENCE) == alone(server, late.request)[:2]
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
def test_a_bad_request_is_refused_and_the_batch_goes_on(server, what):
    make, error, message = BAD[what]
    with server.engine(max_length=40) as engine, gated(server, stop=2) as gate:
        good = engine.submit(ask())
        gate.wait()
        with pytest.raises(error, match=message):
            engine.submit(make())
        gate.open()
        assert good.result(PATIENCE) == alone(server, good.request)


def test_the_longest_request_fits(server):
    request = ask(new=30, prompt=10)
    with server.engine(max_length=40) as engine:
        assert engine.submit(request).result(PATIENCE) == alone(server, request)


def test_a_failing_forward_fails_its_step_and_nobody_else(server):
    kept: list[weakref.ref[torch.Tensor]] = []

    def fail(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        if output.shape[-2] == 7:
            kept.append(weakref.ref(output))
            raise torch.OutOfMemoryError("no memory for so many tokens")

    handle = server.model.model.layers[1].mlp.register_forward_hook(fail)
    try:
        with server.engine(max_length=40, max_rows=2) as engine, gated(server, stop=2) as gate:
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
            assert waits.result(PATIENCE) == alone(server, waits.request)
            for name in NAMES:
                assert engine.submit(ask(name)).result(PATIENCE) == alone(server, ask(name))
        assert kept
        assert kept[0]() is None
    finally:
        handle.remove()
    assert writer.tokens == alone(server, writer.request)[:3]


def test_what_is_not_finite_fails_alone_and_leaves_no_trace(tmp_path):
    server = server_of(llama, tmp_path)
    config = fastlora.LoRAConfig(r=4, target_modules=["v_proj"])
    broken = randomise_lora(fastlora.replace_linear(llama(), config), float("nan"))
    fastlora.save_adapter(broken, tmp_path / "broken")
    server.load_adapter(tmp_path / "broken", "two")
    with server.engine(max_length=40, max_rows=2) as engine:
        streams = [engine.submit(ask(name, new=8)) for name in ("one", "two", "three", "one")]
        sampled = engine.submit(ask("two", do_sample=True))
        for stream in (streams[1], sampled):
            with pytest.raises(RuntimeError, match="adapter_name: the logits with 'two' are not"):
                stream.result(PATIENCE)
        for stream in (streams[0], *streams[2:]):
            assert stream.result(PATIENCE) == alone(server, stream.request)


def test_many_threads_ask(server):
    requests = mixed() * 3
    expected = [alone(server, request) for request in requests]
    with server.engine(max_length=40, max_rows=5) as engine, ThreadPoolExecutor(6) as pool:
        texts = pool.map(lambda request: engine.submit(request).result(PATIENCE), requests)
        assert list(texts) == expected


@pytest.mark.parametrize("kind", ["llama", "eager"])
def test_the_server_is_called_while_an_engine_runs(kind, tmp_path):
    server = server_of(BUILDS[kind], tmp_path)
    ids = tokens(3, 7)
    mask = torch.ones_like(ids)
    ids[1, :3] = mask[1, :3] = 0
    options = {"adapter_names": ["one", None, "two"], "attention_mask": mask, "max_new_tokens": 6}
    expected, request = server.generate(ids, **options), ask(new=30)
    text = alone(server, request)
    with server.engine(max_length=40) as engine, gated(server, stop=3) as gate:
        stream = engine.submit(request)
        gate.wait()
        gate.stop = None  # for calls in this thread
        assert torch.equal(server.generate(ids, **options), expected)
        gate.open()
        assert torch.equal(server.generate(ids, **options), expected)
        assert stream.result(PATIENCE) == text


def test_samples_are_those_of_generate_whoever_else_draws(server):
    ways = [
        {},
        {"temperature": 0.7},
        {"top_k": 5},
        {"top_p": 0.6},
        {"temperature": 2.0, "top_k": 20, "top_p": 0.9},
    ]
    requests = [ask("two", new=12, do_sample=True, seed=s, **w) for s, w in enumerate(ways)]
    expected = []
    for request, way in zip(requests, ways, strict=True):
        torch.manual_seed(request.seed)
        options = {"do_sample": True, "top_k": 0} | way
        expected.append(alone(server, request, **options))
    others = [ask(name, do_sample=True, new=9) for name in NAMES]
    with server.engine(max_length=40, max_rows=3) as engine:
        streams = [engine.submit(r) for r in [*others, *requests, *others]]
        got = [stream.result(PATIENCE) for stream in streams][3:8]
    assert got == expected
    assert len({tuple(text) for text in got}) == len(ways)


def test_draws_without_a_seed_follow_torchs(server):
    request = ask(do_sample=True, new=12, temperature=3.0)
    texts = []
    with server.engine(max_length=40) as engine:
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            texts.append(engine.submit(request).result(PATIENCE))
    assert texts[0] == texts[1] != texts[2]


def test_closing_cancels_and_frees(server):
    engine = server.engine(max_length=512, max_rows=3)
    cache = engine._loop.runner.cache
    # Two layers, keys and values, rows, heads, positions, their size, four bytes.
    assert engine.cache_bytes == cache.nbytes == 2 * 2 * 3 * 2 * 512 * 8 * 4
    pools = [weakref.ref(pool) for pair in cache.layers.values() for pool in pair]
    with gated(server, stop=4) as gate:
        runs, waits = engine.submit(ask(new=400)), [engine.submit(ask()) for _ in range(4)]
        gate.wait()
        closer = threading.Thread(target=engine.close)
        closer.start()
        while not engine._loop._closed:
            threading.Event().wait(0.001)
        gate.open()
        closer.join(PATIENCE)
    assert runs.finish_reason == "cancelled"
    assert runs.tokens == alone(server, runs.request)[:5]
    assert waits[-1].finish_reason == "cancelled"
    assert waits[-1].result() == []
    with pytest.raises(RuntimeError, match="request: the engine is closed"):
        engine.submit(ask())
    del cache
    gc.collect()
    assert [pool() for pool in pools] == [None] * 4
    engine.close()


def test_an_engine_that_is_dropped_ends_and_holds_nothing(tmp_path):
    server = server_of(llama, tmp_path)
    text = server.engine(max_length=40).submit(ask()).result(PATIENCE)  # its stream holds it
    assert text == alone(server, ask())
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


def test_the_models_config_is_its_own_again(server):
    config = server.model.config
    kind = type(config)
    with server.engine(max_length=40), server.engine(max_length=40) as second:
        assert isinstance(config, kind)
        assert config._attn_implementation == "sdpa"
        for copied in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
            assert type(copied) is kind
            assert copied.to_dict() == config.to_dict()
        second.close()
        assert type(config) is not kind
    assert type(config) is kind


def test_settings_of_the_thread_that_makes_it(server):
    seen = []

    def look(*_: object) -> None:
        seen.append((invariance.asked(), dispatch.asked()))

    handle = server.model.register_forward_hook(look)
    try:
        with fastlora.batch_invariant(), fastlora.use_backend("torch"):
            first = Engine(server, max_length=40)
        with first, Engine(server, max_length=40) as second:
            for engine in (first, second):
                engine.submit(ask(new=1)).result(PATIENCE)
    finally:
        handle.remove()
    assert seen == [(True, "torch"), (False, dispatch.asked())]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_deeper_models_of_any_dtype(dtype):
    """Rounding adds up (to 2e-6 here in float32), and makes them no other model."""
    server = MultiLoRAModel(llama(dtype=dtype, hidden_size=128, num_hidden_layers=6))
    request = ask(None, new=8)
    with server.engine(max_length=40) as engine:
        assert engine._loop.runner.cache.kinds[5].dtype == dtype
        text = engine.submit(request).result(PATIENCE)
    assert len(text) == 8
    if dtype in (torch.float32, torch.float64):
        assert text == alone(server, request)


def test_a_head_with_adapters(tmp_path):
    """It must see every token, not only those that are followed by one."""
    server = MultiLoRAModel(llama(), max_rank=4, target_modules=["q_proj", "lm_head"])
    config = fastlora.LoRAConfig(r=4, target_modules=["q_proj", "lm_head"])
    fastlora.save_adapter(randomise_lora(fastlora.replace_linear(llama(), config), 0.5), tmp_path)
    server.load_adapter(tmp_path, "one")
    requests = [ask("one", new=8), ask(None, new=8, prompt=9)]
    with server.engine(max_length=40, step_tokens=4) as engine:
        streams = [engine.submit(request) for request in requests]
        got = [stream.result(PATIENCE) for stream in streams]
    assert got == [alone(server, request) for request in requests]


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)


def looking_back() -> nn.Module:
    """A model that mixes tokens where nobody expects it."""
    model = llama()
    model.model.layers[0].mlp.register_forward_hook(lambda *args: args[-1].cumsum(1))
    return model


REFUSED = {
    "an encoder": (t5, ValueError, "T5ForConditionalGeneration cannot be streamed: it has an enc"),
    "no writer": (bert, ValueError, "BertForMaskedLM cannot be streamed: it does not write texts"),
    "no transformer": (Plain, TypeError, "expected a decoder of transformers to stream, got Plain"),
    "softcap": (gemma2, ValueError, "Gemma2Attention: attention with softcap is not streamed"),
    "tokens mixed elsewhere": (looking_back, ValueError, "a text has other logits beside another"),
    "positions that depend on others": (
        lambda: llama(rope_scaling={"rope_type": "dynamic", "factor": 2.0}),
        ValueError,
        "its positions .dynamic. depend on the longest text",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_models_that_cannot_be_streamed(what):
    build, error, message = REFUSED[what]
    server = MultiLoRAModel(build())
    kind = type(getattr(server.model, "config", None))
    with pytest.raises(error, match=f"model: .*{message}"):
        server.engine()
    assert type(getattr(server.model, "config", None)) is kind


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"max_rows": 0}, ValueError, "max_rows: expected a whole number of at least 1, got 0"),
        ({"max_rows": 1.0}, TypeError, "max_rows: expected a whole number, got 1.0"),
        ({"step_tokens": -1}, ValueError, "step_tokens: .*got -1"),
        ({"max_length": True}, TypeError, "max_length: expected a whole number, got True"),
        ({"max_length": 4096}, ValueError, "max_length: expected at most 2048, .*got 4096"),
    ],
)
def test_sizes_that_make_no_sense(server, options, error, message):
    with pytest.raises(error, match=message):
        server.engine(**options)


def test_the_default_length_is_what_the_model_allows(tmp_path):
    with server_of(lambda: gpt2(n_positions=24), tmp_path).engine(max_rows=1) as engine:
        assert engine.max_length == 24
