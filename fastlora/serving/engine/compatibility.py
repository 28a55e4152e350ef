"""Checks whether a model can be streamed: by its config, then by a few tokens through it."""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlora.inspection.wrappers import unwrap
from fastlora.serving.engine.attention_hook import hook_attention
from fastlora.serving.engine.cache import LayerSpec, RowCache
from fastlora.serving.engine.request import check_count
from fastlora.serving.engine.runner import Chunk, Runner, device_of
from fastlora.serving.engine.server import route_tokens
from fastlora.serving.protocol import Server

_LENGTH = 2048
_ATTENTION = {"full_attention", "sliding_attention"}
# Relative norms of logits, above what a dtype's rounding does to them in another order.
_CLOSE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.2}


class Fit(NamedTuple):
    """What an engine has to know of a model: its limits, and what its layers keep."""

    max_length: int
    vocabulary: int
    layers: dict[int, LayerSpec]


# Layers of models that have been tried, with the dtype and device that they had then.
_tried: weakref.WeakKeyDictionary[Any, tuple[Any, dict[int, LayerSpec]]]
_tried = weakref.WeakKeyDictionary()


def check_model(server: Server, max_length: int | None) -> Fit:
    """Checks that a model can be streamed; TypeError or ValueError naming what does not fit."""
    if max_length is not None:
        check_count("max_length", max_length)
    model: Any = unwrap(server.model)
    config = getattr(model, "config", None)
    kind = type(model).__name__
    if not hasattr(type(config), "_attn_implementation"):
        raise TypeError(f"model: expected a decoder of transformers to stream, got {kind}")
    text: Any = config.get_text_config()  # pyright: ignore[reportOptionalMemberAccess]
    refusal = _find_refusal(model, text)
    if refusal:
        raise ValueError(f"model: {kind} cannot be streamed: {refusal}")
    allowed = getattr(text, "max_position_embeddings", None) or max_length or _LENGTH
    length = min(_LENGTH, allowed) if max_length is None else max_length
    if length > allowed:
        raise ValueError(
            f"max_length: expected at most {allowed}, the model's positions, got {length}"
        )
    table = model.get_input_embeddings().weight
    state = (table.dtype, table.device)
    if _tried.get(model, (None,))[0] != state:
        _tried[model] = state, _try_texts(server, model)
    layers = _tried[model][1]
    if len(layers) != text.num_hidden_layers:
        raise ValueError(
            f"model: {kind} cannot be streamed: {text.num_hidden_layers - len(layers)} of its "
            "layers have no attention over tokens"
        )
    return Fit(length, table.shape[0], layers)


def eos_of(server: Server) -> frozenset[int]:
    """Returns the tokens that end a text, by the model's generation_config."""
    config = getattr(unwrap(server.model), "generation_config", None)
    eos = getattr(config, "eos_token_id", None)
    return frozenset([eos] if isinstance(eos, int) else eos or ())


def _find_refusal(model: Any, config: Any) -> str | None:
    if config.is_encoder_decoder:
        return "it has an encoder"
    if not (callable(getattr(model, "can_generate", None)) and model.can_generate()):
        return "it does not write texts"
    other = set(getattr(config, "layer_types", None) or ()) - _ATTENTION
    if other or getattr(config, "attention_chunk_size", None):
        return f"its layers are of type {min(other or {'chunked_attention'})}"
    # transformers 5 says it by the new name, and for each type of layer where those differ.
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    of_layers = [part for part in rope.values() if isinstance(part, dict)] or [rope]
    for part in of_layers:
        kind = part.get("rope_type", part.get("type"))
        if kind in ("dynamic", "longrope"):
            return f"its positions ({kind}) depend on the longest text of the batch"
    return None


@torch.no_grad()
def _try_texts(server: Server, model: Any) -> dict[int, LayerSpec]:
    """Streams two texts in parts; returns what the layers keep of them.

    Raises ValueError unless each text has the logits that it has alone, and every layer sees all
    tokens in their order.
    """
    kind = type(model).__name__
    vocabulary = model.get_input_embeddings().weight.shape[0]
    texts = [
        [(7 + 31 * i) % vocabulary for i in range(6)],
        [(3 + 17 * i) % vocabulary for i in range(4)],
    ]
    runner = Runner(server, RowCache(3, len(texts[0])), followed=True)
    steps = [
        [Chunk(2, 0, texts[0][:3], last=False)],
        [Chunk(0, 0, texts[1][:3], last=False), Chunk(2, 3, texts[0][3:5], last=False)],
        [Chunk(0, 3, texts[1][3:]), Chunk(2, 5, texts[0][5:])],
    ]
    try:
        with hook_attention(server.model):
            *_, (second, first) = [runner.step(chunks) for chunks in steps]
    except Exception as error:
        raise ValueError(f"model: {kind} cannot be streamed: {error}") from error
    for text, got in zip(texts, (first, second), strict=True):
        ids = torch.tensor([text], device=device_of(server))
        with route_tokens(server, [-1] * len(text), [1.0] * len(text)):
            want = server.model(input_ids=ids, use_cache=False).logits[0, -1]
        difference = _compare(got, want)
        if not difference <= _CLOSE.get(want.dtype, 0.2):
            raise ValueError(
                f"model: {kind} cannot be streamed: a text has other logits beside another than "
                f"alone, a relative difference of {difference:.2g}"
            )
    return runner.cache.specs


def _compare(got: Tensor, want: Tensor) -> float:
    """Returns the relative difference of logits, up to a constant, which changes nothing."""
    got, want = (logits.double() - logits.double().mean() for logits in (got, want))
    return float((got - want).norm() / want.norm().clamp_min(1e-12))
