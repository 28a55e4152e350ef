"""Simulates PEFT that keeps its virtual tokens in generate, or loses them."""

from __future__ import annotations

import functools
from typing import Any

import peft
import pytest

from benchmarks.peers import virtual

_OLD, _NEW = "past_key_values", "cache"


def forget_explanations(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the check found of the pair as it is counts neither now nor afterwards."""
    monkeypatch.setattr(virtual, "explain_loss", functools.cache(virtual.explain_loss.__wrapped__))


def keep_virtual_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT prepares a step's inputs under the name that it knows, whatever the model's is."""

    def prepare(self: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        of_base = self.base_model_prepare_inputs_for_generation

        def renamed(*args: Any, **kwargs: Any) -> dict[str, Any]:
            found = of_base(*args, **kwargs)
            return {_OLD if name == _NEW else name: value for name, value in found.items()}

        self.base_model_prepare_inputs_for_generation = renamed
        try:
            found = of_peft(self, *args, **kwargs)
        finally:
            self.base_model_prepare_inputs_for_generation = of_base
        name = virtual.name_cache_argument(self.get_base_model())
        return {name if key == _OLD else key: value for key, value in found.items()}

    of_peft = _preparing(prepare, monkeypatch)


def lose_virtual_tokens_from(token: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From that token on a step's inputs are the model's own, all of its tokens."""

    def prepare(self: Any, input_ids: Any, **kwargs: Any) -> dict[str, Any]:
        if input_ids.shape[1] - 3 < token - 1:
            return of_peft(self, input_ids, **kwargs)
        return {"input_ids": input_ids}

    keep_virtual_tokens(monkeypatch)
    of_peft = _preparing(prepare, monkeypatch)


def _preparing(prepare: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Puts it in the place of PEFT's, which is returned."""
    forget_explanations(monkeypatch)
    kind = peft.PeftModelForCausalLM
    before = kind.prepare_inputs_for_generation
    monkeypatch.setattr(kind, "prepare_inputs_for_generation", prepare)
    return before
