"""Fine-tuning runs with transformers' Trainer, and their measurements."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

EVAL_BATCH = 16


@dataclass(frozen=True)
class Recipe:
    """Recipe of training, the same for every method but the learning rate."""

    steps: int
    batch_size: int
    seed: int


@dataclass(frozen=True)
class Run:
    """Measurements. losses: by step. trained, share: parameters. step_seconds: the median."""

    losses: list[float]
    trained: int
    share: float
    optimizer_bytes: int
    step_seconds: float


def train(
    model: nn.Module,
    blocks: Tensor,
    learning_rate: float,
    recipe: Recipe,
    advance: Callable[[], None],
) -> Run:
    """Trains in place whatever of ``model`` requires a gradient on blocks (n, length) of tokens.

    advance: called after each step. The model is left in eval mode.
    """
    clock = _Clock(advance)
    with tempfile.TemporaryDirectory() as unused:
        trainer = _Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=unused,
                max_steps=recipe.steps,
                per_device_train_batch_size=recipe.batch_size,
                learning_rate=learning_rate,
                warmup_steps=0.05,  # of all
                lr_scheduler_type="cosine",
                seed=recipe.seed,
                use_cpu=next(model.parameters()).device.type == "cpu",
                save_strategy="no",
                logging_strategy="no",
                report_to="none",
                disable_tqdm=True,
                dataloader_pin_memory=False,
            ),
            train_dataset=[{"input_ids": b, "labels": b} for b in blocks],
            callbacks=[clock],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    model.eval()
    optimizer = trainer.optimizer
    state = optimizer.state.values() if isinstance(optimizer, torch.optim.Optimizer) else ()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Run(
        losses=[loss.item() for loss in trainer.losses],
        trained=trained,
        share=trained / sum(p.numel() for p in model.parameters()),
        optimizer_bytes=sum(t.nbytes for s in state for t in s.values() if isinstance(t, Tensor)),
        step_seconds=statistics.median(clock.seconds),
    )


@torch.no_grad()
def measure_held_out_loss(model: nn.Module, blocks: Tensor) -> float:
    """Measures the mean loss a token on blocks (n, length), in nats."""
    model.eval()
    device = next(model.parameters()).device
    total = 0.0
    for batch in blocks.to(device).split(EVAL_BATCH):
        total += model(input_ids=batch, labels=batch).loss.item() * len(batch)
    return total / len(blocks)


def time_steps(models: Sequence[nn.Module], batch: Tensor, rounds: int) -> list[float]:
    """Measures median seconds of each model's training step, in turns so that noise hits all."""
    steps = [_make_step(model, batch) for model in models]
    seconds: list[list[float]] = [[] for _ in models]
    for turn in range(rounds + 1):
        for i in range(len(models)):
            which = (i + turn) % len(models)
            start = time.perf_counter()
            steps[which]()
            seconds[which].append(time.perf_counter() - start)
    return [statistics.median(s[1:]) for s in seconds]  # the first step also allocates


def _make_step(model: nn.Module, batch: Tensor) -> Callable[[], None]:
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    # A rate of 0: the work of a step without its effect.
    optimizer = torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0)
    batch = batch.to(trained[0].device)

    def step() -> None:
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


class _Trainer(Trainer):
    """Trainer that keeps the loss of every step, unrounded."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.losses: list[Tensor] = []

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        self.losses.append(loss.detach())
        return loss


class _Clock(TrainerCallback):
    """Clock of each step, from the forward to the optimizer's end; moves the progress bar."""

    def __init__(self, advance: Callable[[], None]) -> None:
        self.seconds: list[float] = []
        self._advance = advance
        self._start = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._start = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.append(time.perf_counter() - self._start)
        self._advance()
