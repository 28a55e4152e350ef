"""Methods of fine-tuning: each takes a copy of the base and sets what of it trains."""

from __future__ import annotations

from typing import Any

import peft
import torch
from torch import nn
from transformers import PreTrainedModel

import fastlora
from fastlora.demo.model import clone, find_last_block
from fastlora.demo.settings import Stage

# Our LoRAConfig and PEFT's take the same.
SETTINGS: dict[str, Any] = {
    "r": 8,
    "lora_alpha": 16,
    "target_modules": "all-linear",
    "task_type": "CAUSAL_LM",
}


def prepare_full(stage: Stage) -> PreTrainedModel:
    """Prepares a copy of which everything trains."""
    return clone(stage.base).requires_grad_(True)


def prepare_last_block(stage: Stage) -> PreTrainedModel:
    """Prepares a copy of which the last decoder block trains, attention and all."""
    model = clone(stage.base).requires_grad_(False)
    find_last_block(model).requires_grad_(True)
    return model


def prepare_last_layer(stage: Stage) -> PreTrainedModel:
    """Prepares a copy of which the output layer trains."""
    model = clone(stage.base).requires_grad_(False)
    head = model.get_output_embeddings()
    (head if isinstance(head, nn.Module) else find_last_block(model)).requires_grad_(True)
    return model


def prepare_lora(stage: Stage) -> PreTrainedModel:
    """Prepares a copy with a fresh adapter in every linear, the same each time."""
    torch.manual_seed(stage.recipe.seed)
    model = clone(stage.base)
    fastlora.replace_linear(model, fastlora.LoRAConfig(**SETTINGS))
    return model


def prepare_peft_lora(stage: Stage) -> peft.PeftModel:
    """Prepares the same by PEFT, with the same initial weights."""
    model = peft.get_peft_model(clone(stage.base), peft.LoraConfig(**SETTINGS))
    peft.set_peft_model_state_dict(model, fastlora.adapter_state_dict(prepare_lora(stage)))
    return model
