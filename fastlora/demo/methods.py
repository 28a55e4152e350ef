"""The ways to fine-tune: each takes a copy of the base and says what of it trains."""

from __future__ import annotations

from typing import Any

import peft
import torch
from torch import nn
from transformers import PreTrainedModel

import fastlora
from fastlora.demo.model import clone, last_block
from fastlora.demo.stage import Stage

# Our LoRAConfig and PEFT's take the same.
SETTINGS: dict[str, Any] = {
    "r": 8,
    "lora_alpha": 16,
    "target_modules": "all-linear",
    "task_type": "CAUSAL_LM",
}


def full(stage: Stage) -> PreTrainedModel:
    """Everything trains."""
    return clone(stage.base).requires_grad_(True)


def only_last_block(stage: Stage) -> PreTrainedModel:
    """The last decoder block trains, attention and all."""
    model = clone(stage.base).requires_grad_(False)
    last_block(model).requires_grad_(True)
    return model


def only_last_layer(stage: Stage) -> PreTrainedModel:
    """The output layer trains, which turns the last hidden state into logits."""
    model = clone(stage.base).requires_grad_(False)
    head = model.get_output_embeddings()
    (head if isinstance(head, nn.Module) else last_block(model)).requires_grad_(True)
    return model


def lora(stage: Stage) -> PreTrainedModel:
    """A fresh adapter in every linear trains; the same one each time."""
    torch.manual_seed(stage.recipe.seed)
    model = clone(stage.base)
    fastlora.replace_linear(model, fastlora.LoRAConfig(**SETTINGS))
    return model


def peft_lora(stage: Stage) -> peft.PeftModel:
    """``lora`` by PEFT, with the same initial weights."""
    model = peft.get_peft_model(clone(stage.base), peft.LoraConfig(**SETTINGS))
    peft.set_peft_model_state_dict(model, fastlora.adapter_state_dict(lora(stage)))
    return model
