"""Engine accepts models it can stream, refuses others, and leaves the model unchanged."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

import fastlora
from fastlora import MultiLoRAModel
from fastlora.ops import dispatch, invariance
from fastlora.serving import Engine
from fastlora.serving.engine import compatibility
from tests.support.models import bert, gemma2, gpt2, llama, randomise_lora, t5
from tests.support.serving.streams import PATIENCE, ask, generate_alone, server_of


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> MultiLoRAModel:
    server = server_of(llama, tmp_path_factory.mktemp("adapters"))
    server.engine(max_rows=1, max_length=8).close()  # what it tries of a model is tried now
    return server


def test_closed_engines_restore_config_class_of_model(server):
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


def test_engine_keeps_settings_of_its_creating_thread(server):
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
def test_engine_matches_generate_for_deeper_models(dtype):
    """Rounding adds up (to 2e-6 here in float32), and makes them no other model."""
    server = MultiLoRAModel(llama(dtype=dtype, hidden_size=128, num_hidden_layers=6))
    request = ask(None, new=8)
    with server.engine(max_length=40) as engine:
        assert engine._loop.runner.cache.specs[5].dtype == dtype
        text = engine.submit(request).result(PATIENCE)
    assert len(text) == 8
    if dtype in (torch.float32, torch.float64):
        assert text == generate_alone(server, request)


def test_engine_matches_generate_when_head_has_lora(tmp_path):
    """It must see every token, not only those that are followed by one."""
    server = MultiLoRAModel(llama(), max_rank=4, target_modules=["q_proj", "lm_head"])
    config = fastlora.LoRAConfig(r=4, target_modules=["q_proj", "lm_head"])
    fastlora.save_adapter(randomise_lora(fastlora.replace_linear(llama(), config), 0.5), tmp_path)
    server.load_adapter(tmp_path, "one")
    requests = [ask("one", new=8), ask(None, new=8, prompt=9)]
    with server.engine(max_length=40, step_tokens=4) as engine:
        streams = [engine.submit(request) for request in requests]
        got = [stream.result(PATIENCE) for stream in streams]
    assert got == [generate_alone(server, request) for request in requests]


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)


def model_mixing_tokens() -> nn.Module:
    """A model that mixes tokens where nobody expects it."""
    model = llama()
    model.model.layers[0].mlp.register_forward_hook(lambda *args: args[-1].cumsum(1))
    return model


def model_flipping_tokens() -> nn.Module:
    """The same logits; with adapters a token would go through another's."""
    model = llama()
    layer = model.model.layers[1].mlp
    layer.register_forward_pre_hook(lambda module, args: (args[0].flip(1),))
    layer.register_forward_hook(lambda *args: args[-1].flip(1))
    return model


REFUSED = {
    "an encoder": (t5, ValueError, "T5ForConditionalGeneration cannot be streamed: it has an enc"),
    "no writer": (bert, ValueError, "BertForMaskedLM cannot be streamed: it does not write texts"),
    "no transformer": (Plain, TypeError, "expected a decoder of transformers to stream, got Plain"),
    "softcap": (gemma2, ValueError, "Gemma2Attention: attention with softcap is not streamed"),
    "tokens mixed elsewhere": (
        model_mixing_tokens,
        ValueError,
        "it does not see the tokens in their order",
    ),
    "tokens turned about a layer": (
        model_flipping_tokens,
        ValueError,
        "1.mlp.gate_proj: it does not see the tokens in their order",
    ),
    "positions that depend on others": (
        lambda: llama(rope_scaling={"rope_type": "dynamic", "factor": 2.0}),
        ValueError,
        "its positions .dynamic. depend on the longest text",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_engine_refuses_models_it_cannot_stream(what):
    build, error, message = REFUSED[what]
    server = MultiLoRAModel(build())
    kind = type(getattr(server.model, "config", None))
    with pytest.raises(error, match=f"model: .*{message}"):
        server.engine()
    assert type(getattr(server.model, "config", None)) is kind


DYNAMIC, USUAL = {"rope_type": "dynamic", "factor": 2.0}, {"rope_type": "default"}


@pytest.mark.parametrize(
    "said, refused",
    [
        ({"rope_scaling": DYNAMIC}, True),
        ({"rope_scaling": {"type": "longrope", "short_factor": [1.0]}}, True),
        ({"rope_scaling": None}, False),
        ({"rope_parameters": DYNAMIC, "rope_scaling": USUAL}, True),
        ({"rope_parameters": {"sliding_attention": USUAL, "full_attention": DYNAMIC}}, True),
        ({"rope_parameters": {"sliding_attention": USUAL, "full_attention": USUAL}}, False),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, False),
    ],
)
def test_engine_refuses_position_types_by_any_config_name(said, refused):
    config = SimpleNamespace(is_encoder_decoder=False, **said)
    writer = SimpleNamespace(can_generate=lambda: True)
    assert ("positions" in (compatibility._find_refusal(writer, config) or "")) == refused


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
def test_engine_refuses_invalid_sizes(server, options, error, message):
    with pytest.raises(error, match=message):
        server.engine(**options)


def test_default_max_length_is_limit_of_model(tmp_path):
    with server_of(lambda: gpt2(n_positions=24), tmp_path).engine(max_rows=1) as engine:
        assert engine.max_length == 24
