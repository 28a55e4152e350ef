"""Unsloth's LoRA layer, and a PEFT model on Liger's kernels.

Held to the gate on a CPU, without the packages' own start: ``LoRA_W`` of Unsloth 2026.10.9; Liger
0.8.5 interpreted, a step's loss and gradients beside PEFT's. Neither has run on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from benchmarks.harness.case import Absent, Case
from benchmarks.peers.calls import calling, importing

# What Liger replaces in transformers' module for every Llama of the process, not for one alone.
_SHARED = ("LlamaRMSNorm", "LlamaMLP", "apply_rotary_pos_emb")


def import_unsloth_linear(case: Case) -> Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]:
    """Imports Unsloth's ``LoRA_W``, a function of x (M, K), weight, lora_A, lora_B and scaling.

    Its products are torch's; its own is the order of the backward, and what that keeps. Importing
    Unsloth changes settings of torch and transformers: let it come after the others of a case.
    """
    if case.dropout:
        raise Absent("which dropout masks unsloth draws is not known here")
    with importing("unsloth"):
        from unsloth.kernels.fast_lora import LoRA_W

    def linear(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
        return LoRA_W.apply(x[None], weight, None, lora_A, lora_B, scaling)[0]

    return linear


def apply_liger(model: Any) -> Any:
    """Puts Liger's norm, rotation, SwiGLU and loss into a PEFT model of transformers' Llama.

    The same model, in training mode. Liger has no LoRA of its own: PEFT's layers stay. Other models
    of the process are left as they are.
    """
    with importing("liger-kernel"):
        from liger_kernel.transformers import apply_liger_kernel_to_llama, liger_rotary_pos_emb
        from transformers.models.llama import modeling_llama

    llama = model.get_base_model()
    shared = {name: getattr(modeling_llama, name) for name in _SHARED}

    def restore(*_: Any) -> None:
        for name, value in shared.items():
            setattr(modeling_llama, name, value)

    def rotate(*_: Any) -> None:
        modeling_llama.apply_rotary_pos_emb = liger_rotary_pos_emb

    try:
        with calling("liger-kernel"):
            apply_liger_kernel_to_llama(rope=False, model=llama)
    finally:
        restore()
    llama.register_forward_pre_hook(rotate)
    llama.register_forward_hook(restore, always_call=True)
    # Its loss does without logits only while training.
    return model.train()
