"""Signatures: what two forwards that go the same way have in common, values apart."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class UnknownInput(Exception):
    """An input that a forward may depend on and that nobody looks into."""


def find_tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [t for part in value for t in find_tensors(part)]
    return []


def count_rows(batch: list[Any], dim: int) -> int | None:
    for value in batch:
        for t in find_tensors(value):
            if t.dim() > dim:
                return t.shape[dim]
    return None


def make_signature(inputs: Mapping[str, Any]) -> tuple[Any, ...]:
    """Describes what a forward may depend on, values apart.

    While one token a row is decoded, how long the cache and its mask have become is left out.
    """
    main = inputs.get("decoder_input_ids", inputs.get("input_ids"))
    decoding = (
        isinstance(main, Tensor)
        and main.shape[-1] == 1
        # transformers 5.24 says it by the other name.
        and (inputs.get("past_key_values") is not None or inputs.get("cache") is not None)
    )
    return tuple((name, _describe(value, decoding)) for name, value in inputs.items())


def drop_lengths(signature: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Leaves out the lengths of texts; None for other inputs than texts."""
    entries = []
    for name, look in signature:
        if isinstance(look, tuple) and isinstance(look[0], torch.dtype):
            if len(look[1]) != 2 or look[0].is_floating_point:
                return None
            look = (look[0], look[1][:1])
        entries.append((name, look))
    return tuple(entries)


def _describe(value: Any, decoding: bool) -> Any:
    if isinstance(value, Tensor):
        shape = (value.dim(), value.shape[:1]) if decoding else value.shape
        # A form that a module may go by: which dimension lies closest.
        order = None if decoding or value.layout != torch.strided else value.is_contiguous()
        return value.dtype, shape, value.layout, order
    if value is None or isinstance(value, (bool, int, float, str)):
        return type(value), value
    if isinstance(value, (enum.Enum, torch.dtype, torch.device)):
        return value
    if isinstance(value, Mapping):
        return type(value), tuple((str(k), _describe(v, decoding)) for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return type(value), tuple(_describe(v, decoding) for v in value)
    if type(value).__module__.startswith("transformers.") and hasattr(value, "get_seq_length"):
        return type(value), _describe_cache(value)
    raise UnknownInput(type(value).__name__)


def _describe_cache(value: Any) -> Any:
    """Describes whether a cache holds something, and which parts of an encoder's are known."""
    length = getattr(value, "get_seq_length", None)
    is_updated = getattr(value, "is_updated", None)
    is_filled = bool(length()) if callable(length) else None
    return is_filled, tuple(is_updated.values()) if isinstance(is_updated, dict) else None
