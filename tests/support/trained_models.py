"""Models of several adapters in training, and each adapter alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

import fastlora
from fastlora import LoRAConfig
from tests.support.models import llama, randomise_lora

NAMES = ("anna", "ben", "c.d-e", "dora")
CONFIG = LoRAConfig(r=4, lora_alpha=12, target_modules="all-linear")


def model_of_several_adapters(
    base: nn.Module | None = None, config: LoRAConfig = CONFIG
) -> nn.Module:
    model = fastlora.replace_linear(base or llama(), config, adapter_names=NAMES)
    return randomise_lora(model)


def model_of_one_adapter(model: nn.Module, name: str, base: nn.Module | None = None) -> nn.Module:
    """A model with the one adapter, of the same values."""
    single = fastlora.replace_linear(base or llama(), training_config(model))
    values = fastlora.adapter_state_dict(model, name)
    with torch.no_grad():
        for key, parameter in fastlora.adapter_state_dict(single).items():
            parameter.copy_(values[key])
    return single


def training_config(model: nn.Module) -> LoRAConfig:
    return fastlora.model.record.get_injection(model).config


def losses_of_rows(model: nn.Module, ids: Tensor) -> Tensor:
    """Of each row its tokens' mean."""
    out = model(input_ids=ids).logits.float()
    each = nnf.cross_entropy(out[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return each.view(len(ids), -1).mean(1)


def per_adapter(loss: Tensor, names: Sequence[str | None]) -> dict[str, Tensor]:
    return {
        name: loss[[i for i, other in enumerate(names) if other == name]].mean()
        for name in dict.fromkeys(names)
        if name is not None
    }
