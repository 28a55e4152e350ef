"""A step's attention in the place of the model's, in the thread that runs the step, while it does.

transformers' models call the attention that their config names, with the new tokens' queries, keys
and values. The config is lent a class whose name for it depends on the thread, so that whoever
calls the model meanwhile has what he always had.
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
# What some models give their attention that is not computed here.
_REFUSED = ("softcap", "s_aux", "sinks", "position_bias", "head_mask")


class _Running(threading.local):
    step: Step | None = None


_running = _Running()
_lock = threading.Lock()
# By id, how often a config has been lent its class.
_lent: dict[int, int] = {}


@contextmanager
def attending(step: Step) -> Iterator[None]:
    """Within, forwards of this thread, of a model within ``hooked``, are the step's."""
    _running.step = step
    try:
        yield
    finally:
        _running.step = None


@contextmanager
def hooked(model: nn.Module) -> Iterator[None]:
    """Within, the model's attention is that of the step which a thread runs, if it runs one."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS[_NAME] = _attend
    found: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    configs = {id(c): c for c in found if hasattr(type(c), "_attn_implementation")}
    with _lock:
        for key, config in configs.items():
            _lent[key] = _lent.get(key, 0) + 1
            if _lent[key] == 1:
                config.__class__ = _lent_class(type(config))
    try:
        yield
    finally:
        with _lock:
            for key, config in configs.items():
                _lent[key] -= 1
                if not _lent[key]:
                    del _lent[key]
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
    """As transformers' models call it."""
    step = _running.step
    assert step is not None
    given = [name for name in _REFUSED if options.get(name) is not None]
    layer = getattr(module, "layer_idx", None)
    if given or layer is None or not getattr(module, "is_causal", True):
        what = f"attention with {given[0]}" if given else "such attention"
        raise ValueError(f"{type(module).__name__}: {what} is not streamed")
    found = step.attend(int(layer), query, key, value, scaling, sliding_window)
    declare(found, query, 0, 2, 1, 3)
    return found, None


@cache
def _lent_class(kind: Any) -> type:
    """A config's class whose objects name our attention in a thread that runs a step."""

    def name(self: Any) -> Any:
        return kind._attn_implementation.fget(self) if _running.step is None else _NAME

    def rename(self: Any, value: Any) -> None:
        kind._attn_implementation.fset(self, value)

    def reduced(self: Any, protocol: Any) -> Any:
        # Copies are of the class that there was.
        _, _, *state = super(lent, self).__reduce_ex__(protocol)
        return object.__new__, (kind,), *state

    parts = {"_attn_implementation": property(name, rename), "__reduce_ex__": reduced}
    lent: Any = type(kind.__name__, (kind,), parts | {"__module__": kind.__module__})
    return lent
