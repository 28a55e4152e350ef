"""The methods of vLLM's wrapper that are ours, on every device: they hand on to ``Layers``.

Within a compiled graph an op takes the call, which looks the step up when the graph runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastlora.integrations.vllm import graph as graph  # defines the ops
from fastlora.integrations.vllm.layers import Layers


class FastLoRAMethods:
    """Mixed into a wrapper of vLLM's. ``key`` is the number by which graphs name ``layers``."""

    layers: Layers
    key: int

    def add_lora_linear(
        self,
        y: Tensor,
        x: Tensor,
        lora_a_stacked: tuple[Tensor, ...],
        lora_b_stacked: tuple[Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        *,
        buffer: Any = None,
        **kwargs: Any,
    ) -> None:
        if torch.compiler.is_compiling():
            A, B = list(lora_a_stacked), list(lora_b_stacked)
            torch.ops.fastlora.vllm_add_linear_(y, x, A, B, scale, self.key)
            return
        y, x = y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1])
        self.layers.add_linear(y, x, lora_a_stacked, lora_b_stacked, scale)

    def add_lora_embedding(
        self, y: Tensor, x: Tensor, lora_b_stacked: Tensor, add_inputs: bool = True, **kwargs: Any
    ) -> None:
        if torch.compiler.is_compiling():
            torch.ops.fastlora.vllm_add_expanded_(y, [x], [lora_b_stacked], 0, add_inputs, self.key)
            return
        self.layers.add_expanded(y, (x,), (lora_b_stacked,), add=add_inputs)

    def add_lora_logits(
        self,
        y: Tensor,
        x: Tensor,
        lora_a_stacked: Tensor,
        lora_b_stacked: Tensor,
        scale: float,
        *,
        buffer: Any = None,
        **kwargs: Any,
    ) -> None:
        y, x = y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1])
        self.layers.add_logits(y, x, lora_a_stacked, lora_b_stacked, scale)

    def add_shrink(
        self, y: Any, x: Tensor, lora_a_stacked: tuple[Tensor, ...], scale: float, **kwargs: Any
    ) -> None:
        self.layers.add_shrunk(list(y), x.view(-1, x.shape[-1]), lora_a_stacked, scale)

    def add_expand(
        self,
        y: Tensor,
        x: Any,
        lora_b_stacked: tuple[Tensor, ...],
        output_slices: tuple[int, ...],
        offset_start: int = 0,
        add_inputs: bool = True,
        **kwargs: Any,
    ) -> None:
        y = y.view(-1, y.shape[-1])
        self.layers.add_expanded(y, list(x), lora_b_stacked, offset_start, add_inputs)
