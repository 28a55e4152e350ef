"""Tensors of a model's adapter: their names in PEFT's files, and their shapes."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from fastlora.adapters.files import Shape
from fastlora.config import LoRAConfig
from fastlora.inspection.wrappers import strip_wrappers

# PEFT's name of each adapter parameter.
KEYS = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "lora_bias": "lora_B.bias"}


def list_adapter_shapes(name: str, base: Sequence[int], config: LoRAConfig) -> dict[str, Shape]:
    """Lists {tensor name: shape} of an adapter for linear ``name`` of (N, K)."""
    (N, K), r = base, config.rank_of(name)
    shapes: dict[str, Shape] = {
        f"{name}.{KEYS['lora_A']}": (r, K),
        f"{name}.{KEYS['lora_B']}": (N, r),
    }
    if config.lora_bias:
        shapes[f"{name}.{KEYS['lora_bias']}"] = (N,)
    return shapes


def find_biases(
    model: nn.Module, config: LoRAConfig, replaced: set[str]
) -> dict[str, nn.Parameter]:
    """Finds {PEFT's name: parameter} of the base's biases that belong to the adapter."""
    biases = {}
    if config.bias == "none":
        return biases
    # PEFT's files name a bias that is tied with another twice.
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner, _, last = strip_wrappers(name).rpartition(".")
        if last != "bias":
            continue
        if owner in replaced:
            biases[f"{owner}.base_layer.{last}"] = parameter
        elif config.bias == "all":
            biases[strip_wrappers(name)] = parameter
    return biases
