"""Ops that a compiled graph of vLLM's keeps; whose each row is they look up when they run."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from fastlora.integrations.vllm.layers import Layers

_layers: weakref.WeakValueDictionary[int, Layers] = weakref.WeakValueDictionary()


def add(layers: Layers) -> int:
    """Returns the number by which graphs name these layers for as long as they live."""
    key = max(_layers.keys(), default=0) + 1
    _layers[key] = layers
    return key


def _add_linear_(
    y: Tensor, x: Tensor, A: Sequence[Tensor], B: Sequence[Tensor], scale: float, key: int
) -> None:
    y, x = y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1])
    _layers[key].add_linear(y, x, A, B, scale)


def _add_expanded_(
    y: Tensor, hs: Sequence[Tensor], B: Sequence[Tensor], first: int, add: bool, key: int
) -> None:
    _layers[key].add_expanded(y.view(-1, y.shape[-1]), hs, B, first, add)


def _write_nothing(*_: object) -> None:
    """What a traced op gives: it writes y, and returns nothing."""


_library = torch.library.Library("fastlora", "FRAGMENT")
for _name, _schema, _function in (
    (
        "vllm_add_linear_",
        "(Tensor(a!) y, Tensor x, Tensor[] A, Tensor[] B, float scale, int key) -> ()",
        _add_linear_,
    ),
    (
        "vllm_add_expanded_",
        "(Tensor(a!) y, Tensor[] hs, Tensor[] B, int first, bool add, int key) -> ()",
        _add_expanded_,
    ),
):
    _library.define(_name + _schema)
    _library.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastlora::{_name}", _write_nothing, lib=_library)
