"""The class that applies LoRA in vLLM on an NVIDIA GPU; imported by vLLM alone.

Only where ``fastlora check`` has verified the kernels: otherwise vLLM keeps its own.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.logger import init_logger
from vllm.lora.punica_wrapper.punica_gpu import PunicaWrapperGPU

from fastlora.integrations.vllm import graph
from fastlora.integrations.vllm.layers import Layers
from fastlora.integrations.vllm.methods import FastLoRAMethods
from fastlora.integrations.vllm.step import DeviceSteps
from fastlora.ops import dispatch

_log = init_logger("vllm.fastlora")


def explain_missing() -> str | None:
    """Why the kernels of many adapters are not used on this GPU, or None where they are."""
    device = torch.device("cuda", torch.cuda.current_device())
    unverified = [
        str(dtype).removeprefix("torch.")
        for dtype in (torch.bfloat16, torch.float16)
        if dispatch.choose("multi_lora_add_", device, dtype, dtype) == "torch"
    ]
    if unverified:
        return (
            f"`fastlora check` has not verified multi_lora_add_ in {' and '.join(unverified)} on "
            f"{torch.cuda.get_device_name(device)}"
        )
    return None


class PunicaWrapperFastLoRACUDA(FastLoRAMethods, PunicaWrapperGPU):
    """vLLM's wrapper with fastlora's Triton kernels; what is not there is vLLM's own."""

    def __init__(
        self, max_num_batched_tokens: int, max_batches: int, device: Any, **kwargs: Any
    ) -> None:
        super().__init__(max_num_batched_tokens, max_batches, device, **kwargs)
        self.layers = Layers(DeviceSteps(max_num_batched_tokens, torch.device(device)))
        self.key = graph.add(self.layers)
        _log.info_once(
            "fastlora applies LoRA of linear, embedding and logits layers, on Triton kernels; "
            "FASTLORA_VLLM=0 switches it off"
        )

    def update_metadata(
        self, mapping: Any, lora_index_to_id: list[int | None], *args: Any, **kwargs: Any
    ) -> None:
        # vLLM's own as well: its experts' layers and those of whole weights read it.
        super().update_metadata(mapping, lora_index_to_id, *args, **kwargs)
        self.layers.begin(self.token_lora_indices, self.sampler_indices, lora_index_to_id)
