"""Replaces a model's attention by a step's, only in the thread that runs the step.

transformers' models call the attention that their config names, with the new tokens' queries, keys
and values. The config gets a subclass of its class, whose name for the attention depends on the
thread: every other thread keeps the model's own attention.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from torch import Tensor, nn

from fastlora.rows.tracing import declare
from fastlora.serving.engine.attention import Step

_NAME = "fastlora_rows"
# Options of some models' attention that are not computed here.
_REFUSED = ("softcap", "s_aux", "sinks", "position_bias", "head_mask")


class _Running(threading.local):
    step: Step | None = None


_running = _Running()
_lock = threading.Lock()
# How many hooks are on a config, by its id; it has its own class again when there is none.
_hooks: dict[int, int] = {}


@contextmanager
def attend_with(step: Step) -> Iterator[None]:
    """Within, forwards of this thread attend with ``step``, if the model is hooked."""
    _running.step = step
    try:
        yield
    finally:
        _running.step = None


@contextmanager
def hook_attention(model: nn.Module) -> Iterator[None]:
    """Within, the model's attention is that of the step which a thread runs, if it runs one."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS[_NAME] = _attend
    of_modules: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    configs = {id(c): c for c in of_modules if hasattr(type(c), "_attn_implementation")}
    with _lock:
        for key, config in configs.items():
            _hooks[key] = _hooks.get(key, 0) + 1
            if _hooks[key] == 1:
                config.__class__ = _hooked_class(type(config))
    try:
        yield
    finally:
        with _lock:
            for key, config in configs.items():
                _hooks[key] -= 1
                if not _hooks[key]:
                    del _hooks[key]
                    config.__class__ = type(config).__base__


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Computes the running step's attention; called as transformers' models call theirs."""
    step = _running.step
    assert step is not None
    refused = [name for name in _REFUSED if options.get(name) is not None]
    layer = getattr(module, "layer_idx", None)
    if refused or layer is None or not getattr(module, "is_causal", True):
        what = f"attention with {refused[0]}" if refused else "such attention"
        raise ValueError(f"{type(module).__name__}: {what} is not streamed")
    out = step.attend(int(layer), query, key, value, scaling, sliding_window)
    declare(out, query, 0, 2, 1, 3)
    return out, None


@cache
def _hooked_class(base: Any) -> type:
    """Makes a config's class whose objects name our attention in a thread that runs a step."""

    def get_name(self: Any) -> Any:
        return base._attn_implementation.fget(self) if _running.step is None else _NAME

    def set_name(self: Any, value: Any) -> None:
        base._attn_implementation.fset(self, value)

    def reduce(self: Any, protocol: Any) -> Any:
        # Copies are of the config's own class.
        _, _, *state = super(hooked, self).__reduce_ex__(protocol)
        return object.__new__, (base,), *state

    parts = {"_attn_implementation": property(get_name, set_name), "__reduce_ex__": reduce}
    hooked: Any = type(base.__name__, (base,), parts | {"__module__": base.__module__})
    return hooked
