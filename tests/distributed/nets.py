"""A small model whose adapters matter, its batches, and one process that trains it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as nnf

import fastlora
from fastlora import LoRAConfig

WIDTH, HIDDEN, OUT = 12, 20, 7
# Sums of two halves in float32, in another order than one process's.
TOLERANCE = 1e-5


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, OUT)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def net(dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    """The same in every process; every parameter is random and matters."""
    settings: dict[str, Any] = {"r": 3, "lora_alpha": 6, "target_modules": "all-linear"} | options
    names = settings.pop("adapter_names", None)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Net().to(dtype)
        fastlora.replace_linear(model, LoRAConfig(**settings), adapter_names=names)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn(parameter.shape) * 0.4)
    return model.train()


def batches(count: int, rows: int = 4, dtype: torch.dtype = torch.float32) -> list[Any]:
    """[(x, target), …], the same in every process."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        shapes = [((rows, 5, WIDTH), (rows, 5, OUT)) for _ in range(count)]
        return [(torch.randn(x).to(dtype), torch.randn(y).to(dtype)) for x, y in shapes]


def rows_of_process(batch: Any) -> Any:
    """This process's rows."""
    rank, world = distributed.get_rank(), distributed.get_world_size()
    return tuple(t.chunk(world)[rank] for t in batch)


def loss_of(model: nn.Module, batch: Any) -> Tensor:
    x, target = batch
    return nnf.mse_loss(model(x).float(), target.float())


def mean_over_processes(loss: Tensor) -> float:
    total = loss.detach().clone()
    distributed.all_reduce(total)
    return total.item() / distributed.get_world_size()


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def gather(tensor: Any) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def assert_same(got: Any, want: Any, tolerance: float = TOLERANCE) -> None:
    """Relative norms, of tensors or of dictionaries of them; DTensors are gathered."""
    if isinstance(want, dict):
        assert got.keys() == want.keys()
        for name in want:
            assert_same(got[name], want[name], tolerance)
        return
    got, want = gather(got).detach().double(), gather(want).detach().double()
    assert got.shape == want.shape
    assert want.norm() > 0
    error = ((got - want).norm() / want.norm()).item()
    assert error <= tolerance, f"relative error {error:.1e}, allowed {tolerance:.0e}"


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in trainable_parameters(model).items() if p.grad is not None}


def train(model: nn.Module, data: list[Any], alone: bool = False) -> list[float]:
    """The losses of a step on each batch, of which each process takes its rows."""
    optimizer, losses = optimizer_of(model), []
    for batch in data:
        optimizer.zero_grad()
        loss = loss_of(model, batch if alone else rows_of_process(batch))
        loss.backward()
        optimizer.step()
        losses.append(loss.item() if alone else mean_over_processes(loss))
    return losses
