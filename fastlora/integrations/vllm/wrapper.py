"""The class that applies LoRA in vLLM on a CPU; imported by vLLM alone."""

from __future__ import annotations

from typing import Any

import torch
import vllm
from torch import Tensor
from vllm.logger import init_logger
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from fastlora.backends import native
from fastlora.integrations.vllm import graph
from fastlora.integrations.vllm.interface import VERSIONS
from fastlora.integrations.vllm.layers import Layers

_log = init_logger("vllm.fastlora")


def explain_missing() -> str | None:
    """Why the CPU kernels cannot be used here, or None where they can."""
    return native.unusable()


class PunicaWrapperFastLoRA(PunicaWrapperCPU):
    """vLLM's wrapper with fastlora's kernels; what is not here is vLLM's own."""

    def __init__(
        self, max_num_batched_tokens: int, max_batches: int, device: Any, **kwargs: Any
    ) -> None:
        super().__init__(max_num_batched_tokens, max_batches, device, **kwargs)
        self.layers = Layers()
        self.key = graph.add(self.layers)
        version = vllm.__version__
        tested = "" if version in VERSIONS else f" (not tested with vLLM {version})"
        _log.info_once(
            "fastlora applies LoRA of linear, embedding and logits layers, on %s%s; "
            "FASTLORA_VLLM=0 switches it off",
            native.instruction_set(),
            tested,
        )

    def update_metadata(
        self,
        mapping: Any,
        lora_index_to_id: list[int | None],
        max_loras: int,
        vocab_size: int,
        **kwargs: Any,
    ) -> None:
        self._update_base_metadata(mapping, lora_index_to_id, max_loras, vocab_size)
        self.is_prefill = mapping.is_prefill
        self.layers.begin(self.token_lora_indices, self.sampler_indices, lora_index_to_id)

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
            torch.ops.fastlora.vllm_add_expanded_(y, [x], [lora_b_stacked], 0, self.key)
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
        self,
        y: Any,
        x: Tensor,
        lora_a_stacked: tuple[Tensor, ...],
        scale: float,
        **kwargs: Any,
    ) -> None:
        x = x.view(-1, x.shape[-1])
        self.layers.add_shrunk(list(y), x, lora_a_stacked, scale)

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
