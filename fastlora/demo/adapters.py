"""An adapter for each domain: trained, saved, reopened in PEFT, tried on every domain."""

from __future__ import annotations

from dataclasses import dataclass

import peft
import torch
from torch import Tensor, nn

import fastlora
from fastlora.demo import methods
from fastlora.demo.compare import Outcome, fine_tune
from fastlora.demo.model import clone
from fastlora.demo.settings import Stage
from fastlora.demo.training import measure_held_out_loss

# Of the largest logit. Both sides sum the same few hundred fp32 products a layer in another order
# or batch shape, about 1e-6 of it; without its adapter a row is off by 1e-1.
SAME_LOGITS = 1e-4


@dataclass(frozen=True)
class Probe:
    """One held-out row (1, length), with an adapter's own logits and the base's."""

    row: Tensor
    logits: Tensor
    base: Tensor

    def error(self, logits: Tensor) -> float:
        """Computes how far ``logits`` are from the adapter's own, relative to the largest."""
        return compute_distance(logits, self.logits)

    @property
    def effect(self) -> float:
        """Distance of the base's logits from the adapter's, on the same scale."""
        return compute_distance(self.base, self.logits)


@torch.no_grad()
def compute_logits(model: nn.Module, row: Tensor) -> Tensor:
    return model(input_ids=row.to(next(model.parameters()).device)).logits


def train_all(stage: Stage, done: dict[str, Outcome]) -> dict[str, Probe]:
    """Trains an adapter for each domain that is not ``done``, saves all; returns probes."""
    probes = {}
    for domain, text in stage.domains.items():
        outcome = done.get(domain) or fine_tune(
            stage, "LoRA", methods.prepare_lora(stage), stage.rates.lora, domain
        )
        fastlora.save_adapter(outcome.model, stage.adapter_folder(domain))
        row = text.held_out[:1]
        probes[domain] = Probe(
            row, compute_logits(outcome.model, row), compute_logits(stage.base, row)
        )
    return probes


def compare_on_domains(stage: Stage) -> None:
    """Prints the held-out loss of every adapter on every domain, reopened from its file."""
    stage.screen.chapter("Every adapter on every domain: held-out loss")
    model = clone(stage.base)
    losses = {"base model": _measure_losses(stage, stage.base)}
    for domain in stage.domains:
        stage.screen.announce(f"{domain}'s adapter on every domain")
        fastlora.load_adapter(model, stage.adapter_folder(domain))
        losses[domain] = _measure_losses(stage, model)
    best = {d: min(losses, key=lambda name: losses[name][d]) for d in stage.domains}
    stage.screen.table(
        ["adapter", *stage.domains],
        [
            [name, *(f"{row[d]:.3f} {'◂' if best[d] == name else ' '}" for d in row)]
            for name, row in losses.items()
        ],
    )
    second = {
        d: min(row[d] for name, row in losses.items() if name != d) - losses[d][d] for d in best
    }
    stage.claims.check(
        "on every domain its own adapter has the lowest loss",
        all(d == name for d, name in best.items()),
        f"by {min(second.values()):.2f} nats a token at least",
        counts=stage.quality,
    )


def reopen_in_peft(stage: Stage, probes: dict[str, Probe]) -> peft.PeftModel:
    """Opens every saved adapter in PEFT and claims the same logits; returns the PEFT model."""
    stage.screen.chapter("Saved by fastlora, opened by PEFT")
    stage.screen.announce("reopening in PEFT")
    names = list(stage.domains)
    model = peft.PeftModel.from_pretrained(
        clone(stage.base), stage.adapter_folder(names[0]), adapter_name=names[0]
    )
    for name in names[1:]:
        model.load_adapter(stage.adapter_folder(name), adapter_name=name)
    model.eval()
    errors = {}
    for name, probe in probes.items():
        model.set_adapter(name)
        errors[name] = probe.error(compute_logits(model, probe.row))
    stage.screen.table(
        ["adapter", "its files", "PEFT's logits off by", "the base's off by"],
        [
            [name, _format_size(stage, name), f"{errors[name]:.1e}", f"{probe.effect:.1e}"]
            for name, probe in probes.items()
        ],
    )
    weakest = min(probe.effect for probe in probes.values())
    stage.claims.check(
        "adapters saved by fastlora give the same logits in PEFT",
        max(errors.values()) <= SAME_LOGITS and weakest >= 10 * SAME_LOGITS,
        f"off by {max(errors.values()):.0e} of the largest, the base by {weakest:.0e}",
    )
    return model


def _measure_losses(stage: Stage, model: nn.Module) -> dict[str, float]:
    return {
        name: measure_held_out_loss(model, text.held_out) for name, text in stage.domains.items()
    }


def _format_size(stage: Stage, domain: str) -> str:
    size = sum(file.stat().st_size for file in stage.adapter_folder(domain).iterdir())
    return f"{size / 1e3:,.0f} kB"


def compute_distance(a: Tensor, b: Tensor) -> float:
    """Computes the largest difference, relative to the largest of ``b``."""
    return ((a - b).abs().max() / b.abs().max()).item()
