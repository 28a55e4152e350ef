"""Models with modules that are trained whole, before and after some training."""

from __future__ import annotations

import torch
import transformers
from torch import Tensor, nn

from fastlora import LoRAConfig
from tests.support.models import VOCABULARY, bert, randomise_lora

HEAD = LoRAConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])


def classifier() -> nn.Module:
    return bert(head="SequenceClassification")


def distilbert() -> nn.Module:
    sizes = {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "vocab_size": VOCABULARY}
    config = transformers.DistilBertConfig(**sizes, initializer_range=0.3)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.DistilBertForSequenceClassification(config).eval()


class Counting(nn.Module):
    """A head with integers in its state."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(6, 6)
        self.head = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4))
        self.aux = nn.ModuleList([nn.Linear(6, 6)])

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def counting() -> Counting:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Counting().eval()


def move_trained_parameters(model: nn.Module) -> nn.Module:
    """As if trained: what trains is somewhere else."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    return randomise_lora(model).eval()
