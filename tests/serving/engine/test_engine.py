"""Engine gives every request the text it gets alone, whatever joins or leaves."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

pytest.importorskip("transformers")

from fastlora import MultiLoRAModel
from tests.support.models import VOCABULARY, gpt2, llama, mistral, qwen2, tokens
from tests.support.serving.streams import (
    NAMES,
    PATIENCE,
    ask,
    gate_forwards,
    generate_alone,
    mixed_requests,
    server_of,
)

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


@pytest.mark.parametrize("step_tokens", [4, 512])
@pytest.mark.parametrize("max_rows", [1, 3, 16])
@pytest.mark.parametrize("kind", BUILDS)
def test_engine_matches_generate_when_requests_join_and_leave(
    kind, max_rows, step_tokens, tmp_path
):
    server = server_of(BUILDS[kind], tmp_path)
    requests = mixed_requests()
    expected = [generate_alone(server, request) for request in requests]
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


def test_each_adapter_writes_a_different_text(server):
    """Or nothing above would be shown."""
    texts = [generate_alone(server, ask(name, new=8)) for name in (None, *NAMES)]
    assert len({tuple(text) for text in texts}) == len(texts)


def test_request_ends_with_its_eos_token(server):
    request = ask(new=20)
    text = generate_alone(server, request)
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


def test_scale_applies_only_to_its_request(server):
    scales = [0.5, 1.0, -1.0, 0.0]
    requests = [ask("two", new=10, scale=scale) for scale in scales]
    expected = [generate_alone(server, r, adapter_scales=[r.scale]) for r in requests]
    with server.engine(max_length=40) as engine:
        streams = [engine.submit(request) for request in requests]
        got = [stream.result(PATIENCE) for stream in streams]
    assert got == expected
    assert got[3] == generate_alone(server, ask(None, new=10))
    assert len({tuple(text) for text in got}) == 4


def test_engine_computes_every_token_once(server):
    """Joining costs the joiner's prompt, and nothing of the others again."""
    requests = mixed_requests()
    with server.engine(max_length=40, max_rows=3) as engine, gate_forwards(server) as gate:
        for stream in [engine.submit(request) for request in requests]:
            stream.result(PATIENCE)
    # The last token of each is written, not read.
    assert sum(gate.sizes) == sum(request.length - 1 for request in requests)


def test_engine_runs_one_forward_per_step(server):
    for names in [["one"] * 4, ["one", None, "two", "three"]]:
        with server.engine(max_length=40) as engine, gate_forwards(server, stop=0) as gate:
            streams = [engine.submit(ask(None, new=1))]
            gate.wait()
            streams += [engine.submit(ask(name, new=5)) for name in names]
            gate.open()
            for stream in streams:
                stream.result(PATIENCE)
        assert gate.sizes == [4, 16, 4, 4, 4, 4]


def test_long_prompt_is_read_in_parts_beside_others(server):
    with (
        server.engine(max_length=64, step_tokens=8) as engine,
        gate_forwards(server, stop=2) as gate,
    ):
        writer = engine.submit(ask("one", new=20))
        gate.wait()
        reader = engine.submit(ask("two", new=2, prompt=50))
        gate.open()
        assert reader.result(PATIENCE) == generate_alone(server, reader.request)
        assert writer.result(PATIENCE) == generate_alone(server, writer.request)
    # 4 of the writer's prompt, it alone, then both: 7 of the prompt of 50 beside each token.
    assert gate.sizes[:3] == [4, 1, 1]
    assert gate.sizes[3:11] == [8] * 7 + [2]


def test_engine_goes_on_when_rows_exceed_step_tokens(server):
    """Every writer goes on, and prompts get on by a token."""
    requests = [ask(name, new=6, prompt=2) for name in (None, *NAMES)]
    with server.engine(max_length=32, step_tokens=1) as engine, gate_forwards(server) as gate:
        streams = [engine.submit(request) for request in requests]
        got = [stream.result(PATIENCE) for stream in streams]
    assert got == [generate_alone(server, request) for request in requests]
    assert max(gate.sizes) <= len(requests) + 1


def test_engine_serves_requests_of_many_threads(server):
    requests = mixed_requests() * 3
    expected = [generate_alone(server, request) for request in requests]
    with server.engine(max_length=40, max_rows=5) as engine, ThreadPoolExecutor(6) as pool:
        texts = pool.map(lambda request: engine.submit(request).result(PATIENCE), requests)
        assert list(texts) == expected


@pytest.mark.parametrize("kind", ["llama", "eager"])
def test_server_answers_calls_while_engine_runs(kind, tmp_path):
    server = server_of(BUILDS[kind], tmp_path)
    ids = tokens(3, 7)
    mask = torch.ones_like(ids)
    ids[1, :3] = mask[1, :3] = 0
    options = {"adapter_names": ["one", None, "two"], "attention_mask": mask, "max_new_tokens": 6}
    expected, request = server.generate(ids, **options), ask(new=30)
    text = generate_alone(server, request)
    with server.engine(max_length=40) as engine, gate_forwards(server, stop=3) as gate:
        stream = engine.submit(request)
        gate.wait()
        gate.stop = None  # for calls in this thread
        assert torch.equal(server.generate(ids, **options), expected)
        gate.open()
        assert torch.equal(server.generate(ids, **options), expected)
        assert stream.result(PATIENCE) == text


def test_seeded_samples_equal_generate_beside_other_requests(server):
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
        expected.append(generate_alone(server, request, **options))
    others = [ask(name, do_sample=True, new=9) for name in NAMES]
    with server.engine(max_length=40, max_rows=3) as engine:
        streams = [engine.submit(r) for r in [*others, *requests, *others]]
        got = [stream.result(PATIENCE) for stream in streams][3:8]
    assert got == expected
    assert len({tuple(text) for text in got}) == len(ways)


def test_samples_without_seed_follow_torch_seed(server):
    request = ask(do_sample=True, new=12, temperature=3.0)
    texts = []
    with server.engine(max_length=40) as engine:
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            texts.append(engine.submit(request).result(PATIENCE))
    assert texts[0] == texts[1] != texts[2]
