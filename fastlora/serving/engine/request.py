"""``Request``: what an engine is asked to write. ``Event``: what it answers."""

from __future__ import annotations

import sys
from collections.abc import Hashable, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Literal, cast

import torch
from torch import Tensor

from fastlora.config import check_number

# Logits divided by less might leave float32's range, and a draw from NaN ends the step of all.
LEAST_TEMPERATURE = 1e-6

FinishReason = Literal["eos", "length", "cancelled", "timeout", "error"]


@dataclass(frozen=True, eq=False)
class Request:
    """A prompt, which adapter continues it, and how.

    input_ids: token ids, or a tensor (n,) or (1, n) of them; kept as a tuple. adapter_name: None
    and ``"__base__"`` name the base model. max_new_tokens: where it ends at the latest. scale: what
    the adapter's part is multiplied by. do_sample: otherwise the likeliest token is taken;
    temperature, top_k (0: all) and top_p work as in transformers' ``generate``, in this order.
    seed: of this request's draws alone; None draws one from torch's generator. eos_token_id: token
    or tokens that end it; None: the model's generation_config's, (): none. timeout: seconds from
    its submission, waiting included. logprobs: whether events have their token's log-probability,
    and those of how many of the likeliest tokens (0: none); of the logits as the model gives them,
    before temperature, top_k and top_p. request_id: whatever tells it from others; unused here.

    Raises TypeError or ValueError naming the field.
    """

    input_ids: Sequence[int] | Tensor
    adapter_name: str | None = None
    _: KW_ONLY
    max_new_tokens: int = 64
    scale: float = 1.0
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    eos_token_id: int | Sequence[int] | None = None
    timeout: float | None = None
    logprobs: int | None = None
    request_id: Hashable | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "input_ids", _ids("input_ids", self.input_ids))
        if not self.input_ids:
            raise ValueError("input_ids: expected at least one token, got none")
        if self.adapter_name is not None and not isinstance(self.adapter_name, str):
            raise TypeError(f"adapter_name: expected a name or None, got {self.adapter_name!r}")
        check_count("max_new_tokens", self.max_new_tokens)
        check_number("scale", self.scale)
        if not isinstance(self.do_sample, bool):
            raise TypeError(f"do_sample: expected a bool, got {self.do_sample!r}")
        _check_above_zero("temperature", self.temperature)
        if self.temperature < LEAST_TEMPERATURE:
            raise ValueError(
                f"temperature: expected at least {LEAST_TEMPERATURE:g}, got {self.temperature}: "
                "do_sample=False takes the likeliest token"
            )
        check_count("top_k", self.top_k, least=0)
        _check_above_zero("top_p", self.top_p)
        if self.top_p > 1:
            raise ValueError(f"top_p: expected a probability in (0, 1], got {self.top_p}")
        if self.seed is not None:
            check_count("seed", self.seed, least=0)
        if self.eos_token_id is not None:
            object.__setattr__(self, "eos_token_id", _ids("eos_token_id", self.eos_token_id))
        if self.timeout is not None:
            _check_above_zero("timeout", self.timeout)
        if self.logprobs is not None:
            check_count("logprobs", self.logprobs, least=0)

    @property
    def prompt(self) -> tuple[int, ...]:
        """input_ids as a tuple."""
        return cast(tuple[int, ...], self.input_ids)

    @property
    def eos(self) -> frozenset[int] | None:
        """eos_token_id as a set."""
        return None if self.eos_token_id is None else frozenset(_ids("", self.eos_token_id))

    @property
    def length(self) -> int:
        """How many tokens it can come to: prompt and continuation."""
        return len(self.prompt) + self.max_new_tokens


@dataclass(frozen=True, eq=False)
class Event:
    """A token of a request, its end, or both.

    token: None where it ended without one. finish_reason: None while it goes on; "eos" and "length"
    come with its last token, "cancelled", "timeout" and "error", with the error, without any.
    logprob, likeliest: what the request's ``logprobs`` asked for, else None and none: the token's
    natural logarithm of probability, and pairs of a token and its own, the likeliest first.
    """

    request: Request
    token: int | None
    finish_reason: FinishReason | None = None
    error: BaseException | None = None
    logprob: float | None = None
    likeliest: tuple[tuple[int, float], ...] = ()


def check_count(name: str, value: object, least: int = 1) -> None:
    """Raises TypeError or ValueError unless it is a whole number of at least ``least``."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: expected a whole number, got {value!r}")
    if not least <= value <= sys.maxsize:
        raise ValueError(f"{name}: expected a whole number of at least {least}, got {value}")


def _ids(name: str, value: object) -> tuple[int, ...]:
    if isinstance(value, Tensor):
        if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
            raise TypeError(f"{name}: expected token ids, got a tensor of {value.dtype}")
        if value.dim() > 2 or (value.dim() == 2 and value.shape[0] != 1):
            raise ValueError(f"{name}: expected shape (n,) or (1, n), got {tuple(value.shape)}")
        value = value.flatten().tolist()
    if isinstance(value, int):
        value = (value,)
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise TypeError(f"{name}: expected token ids, got {type(value).__name__}")
    for token in value:
        check_count(name, token, least=0)
    return tuple(value)


def _check_above_zero(name: str, value: float) -> None:
    check_number(name, value)
    if value <= 0:
        raise ValueError(f"{name}: expected a number above 0, got {value}")
