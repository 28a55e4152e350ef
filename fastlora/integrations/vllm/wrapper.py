"""The class that applies LoRA in vLLM on a CPU; imported by vLLM alone."""

from __future__ import annotations

from typing import Any

import vllm
from vllm.logger import init_logger
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from fastlora.backends import native
from fastlora.integrations.vllm import graph
from fastlora.integrations.vllm.interface import VERSIONS
from fastlora.integrations.vllm.layers import Layers
from fastlora.integrations.vllm.methods import FastLoRAMethods

_log = init_logger("vllm.fastlora")


def explain_missing() -> str | None:
    """Why the CPU kernels cannot be used here, or None where they can."""
    return native.unusable()


class PunicaWrapperFastLoRA(FastLoRAMethods, PunicaWrapperCPU):
    """vLLM's wrapper with fastlora's CPU kernels; what is not there is vLLM's own."""

    def __init__(
        self, max_num_batched_tokens: int, max_batches: int, device: Any, **kwargs: Any
    ) -> None:
        super().__init__(max_num_batched_tokens, max_batches, device, **kwargs)
        self.layers = Layers()
        self.key = graph.add(self.layers)
        version = vllm.__version__
        _log.info_once(
            "fastlora applies LoRA of linear, embedding and logits layers, on %s%s; "
            "FASTLORA_VLLM=0 switches it off",
            native.instruction_set(),
            "" if version in VERSIONS else f" (not tested with vLLM {version})",
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
