"""A block of linears like a transformer's, with adapters of normal numbers."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

import fastlora
from fastlora import FastLoRALinear, LoRAConfig
from tests.support import helpers

WIDTH = 12


class Block(nn.Module):
    """x (B, L, WIDTH) to the same shape: attention and an MLP, one linear without bias."""

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH, dtype=dtype)
        self.q, self.v, self.o = (nn.Linear(WIDTH, WIDTH, dtype=dtype) for _ in range(3))
        self.k = nn.Linear(WIDTH, WIDTH, bias=False, dtype=dtype)
        self.up, self.down = nn.Linear(WIDTH, 20, dtype=dtype), nn.Linear(20, WIDTH, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        x = x + self.o(nnf.scaled_dot_product_attention(self.q(h), self.k(h), self.v(h)))
        return x + self.down(nnf.gelu(self.up(x)))


class Unfused(nn.Linear):
    """A FastLoRALinear's parameters, multiplied by plain torch."""

    def forward(self, input: Tensor) -> Tensor:
        factors = (self.lora_A, self.lora_B, self.scaling)
        biases = {"bias": self.bias, "lora_bias": self.lora_bias}
        return helpers.lora_linear(input, self.weight, *factors, **biases)


def block(dtype: torch.dtype | None = None, **options: Any) -> Block:
    """A block with LoRA in all six linears, or those named; options are LoRAConfig's."""
    config = LoRAConfig(**{"r": 4, "target_modules": "all-linear", **options})
    return randomise_adapters(fastlora.replace_linear(Block(dtype), config))


def randomise_adapters(model: nn.Module) -> nn.Module:
    """Normal numbers in every adapter."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape) * 0.3)
    return model


def unfused_copy(model: nn.Module) -> nn.Module:
    """A copy in plain torch with the same names, which torch differentiates by itself."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if isinstance(module, FastLoRALinear):
            module.__class__ = Unfused
    return twin


def batch(rows: int = 3, dtype: torch.dtype | None = None) -> Tensor:
    return torch.randn(rows, 5, WIDTH).to(dtype or torch.float32)


def adapters_by_name(model: nn.Module) -> dict[str, Tensor]:
    """Detached, by name."""
    return {n: p.detach() for n, p in model.named_parameters() if "lora_" in n}


def gradients(model: nn.Module, run: Any, x: Tensor, seed: int = 3) -> list[Tensor]:
    """Of a loss of ``run(x)``: x's and, by their names' order, those of all that is trained."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    torch.manual_seed(seed)
    run(x).float().square().sum().backward()
    trained = [p for _, p in sorted(model.named_parameters()) if p.requires_grad]
    assert all(p.grad is not None for p in trained)
    return [x.grad, *(p.grad.clone() for p in trained)]
