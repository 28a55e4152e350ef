"""Comparison of full fine-tuning, the last layer only and LoRA; then with PEFT."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import psutil
import torch
from torch import nn
from transformers import PreTrainedModel

import fastlora
from fastlora.demo import methods
from fastlora.demo.settings import Stage
from fastlora.demo.training import Run, measure_held_out_loss, time_steps, train

# Of the distance from the base's held-out loss to full fine-tuning's.
ENOUGH_OF_THE_GAP = 0.70
CLEARLY_MORE = 0.10

# PEFT and fastlora compute the same function in another order of operations. The rounding, about
# 1e-7 of a loss, grows as training amplifies it, tenfold every few steps from the tenth or so on,
# into other weights that are as good. So the losses of the first steps have to be the same, the
# last only in what was learned. A wrong scaling or a layer left out is off by 1e-2 in these steps.
FIRST_STEPS = 10
SAME_LOSS = 1e-4
SAME_LESSON = 0.02  # of what training took off the base's loss


@dataclass(frozen=True)
class Outcome:
    """Model after one method, with its run's measurements and held-out loss."""

    model: nn.Module
    run: Run
    loss: float


def fine_tune(stage: Stage, method: str, model: nn.Module, rate: float, domain: str) -> Outcome:
    """Trains ``model`` in place on ``domain``."""
    stage.screen.announce(f"{method} on {domain}")
    text = stage.domains[domain]
    run = train(model, text.train, rate, stage.recipe, stage.screen.advance)
    return Outcome(model, run, measure_held_out_loss(model, text.held_out))


def compare(stage: Stage, domain: str) -> Outcome:
    """Prints every method's figures on ``domain``, claims LoRA's, and returns its outcome."""
    stage.screen.chapter(f"Fine-tuning on {domain}: everything, a part, or an adapter")
    base = measure_held_out_loss(stage.base, stage.domains[domain].held_out)
    chosen = choose_methods(stage)
    stage.screen.say(str(fastlora.report(methods.prepare_lora(stage))))
    outcomes = {
        name: fine_tune(stage, name, prepare(stage), rate, domain)
        for name, (rate, prepare) in chosen.items()
    }

    def share(name: str) -> float:
        return (base - outcomes[name].loss) / (base - outcomes["full"].loss)

    table = [["base model", "", f"{base:.3f}", "", "", "", ""]]
    for name, outcome in outcomes.items():
        run = outcome.run
        table.append(
            [
                name,
                f"{chosen[name][0]:g}",
                f"{outcome.loss:.3f}",
                f"{share(name):.0%}" if "full" in outcomes else "",
                f"{run.trained:,} ({run.share:.1%})",
                f"{run.optimizer_bytes / 1e6:,.2f} MB",
                f"{run.step_seconds * 1e3:.0f} ms",
            ]
        )
    stage.screen.table(
        ["", "rate", "held-out loss", "of the gap", "trained", "optimizer", "step"], table
    )
    if "full" in outcomes:
        ours, last = share("LoRA"), share("last layer only")
        stage.claims.check(
            f"LoRA closes at least {ENOUGH_OF_THE_GAP:.0%} of the gap to full fine-tuning",
            ours >= ENOUGH_OF_THE_GAP,
            f"{ours:.0%} with {outcomes['LoRA'].run.share:.1%} of the parameters",
            counts=stage.quality,
        )
        stage.claims.check(
            "… and clearly more than training the last layer alone",
            ours >= last + CLEARLY_MORE,
            f"{ours:.0%} against {last:.0%}",
            counts=stage.quality,
        )
    else:
        stage.screen.say("The other methods would not fit in memory beside the base model.")
    return outcomes["LoRA"]


def choose_methods(stage: Stage) -> dict[str, tuple[float, Callable[[Stage], PreTrainedModel]]]:
    """Returns {name: (learning rate, prepare)}; LoRA alone when memory is short."""
    rates = stage.rates
    heavy = {
        "full": (rates.full, methods.prepare_full),
        "last block only": (rates.last_block, methods.prepare_last_block),
        "last layer only": (rates.last_layer, methods.prepare_last_layer),
    }
    return (heavy if _fits(stage.base) else {}) | {"LoRA": (rates.lora, methods.prepare_lora)}


def compare_with_peft(stage: Stage, domain: str, ours: Outcome) -> None:
    """Trains PEFT from the same weights on the same batches; claims the same losses."""
    stage.screen.chapter("PEFT beside us: the same seed, the same initial adapter")
    theirs = fine_tune(stage, "PEFT", methods.prepare_peft_lora(stage), stage.rates.lora, domain)
    steps = list(zip(ours.run.losses, theirs.run.losses, strict=True))[:FIRST_STEPS]
    apart = max(abs(a - b) for a, b in steps)
    learned = measure_held_out_loss(stage.base, stage.domains[domain].held_out) - ours.loss
    stage.screen.announce("timing a step of each, in turns")
    batch = stage.domains[domain].train[: stage.recipe.batch_size]
    models = [methods.prepare_lora(stage), methods.prepare_peft_lora(stage)]
    seconds = time_steps(models, batch, stage.size.timing_rounds)
    stage.screen.table(
        ["", "first loss", "last loss", "held-out loss", "step"],
        [
            [
                name,
                f"{outcome.run.losses[0]:.6f}",
                f"{outcome.run.losses[-1]:.6f}",
                f"{outcome.loss:.6f}",
                f"{second * 1e3:.0f} ms",
            ]
            for name, outcome, second in zip(
                ("fastlora", "PEFT"), (ours, theirs), seconds, strict=True
            )
        ],
    )
    stage.screen.say(f"A step takes {seconds[0] / seconds[1]:.2f} × PEFT's (steps taken in turns).")
    stage.claims.check(
        "from the same weights, PEFT and fastlora train through the same losses",
        apart <= SAME_LOSS,
        f"at most {apart:.0e} apart in the first {len(steps)} steps",
    )
    stage.claims.check(
        "… and learn as much",
        abs(ours.loss - theirs.loss) <= SAME_LESSON * learned,
        f"held-out loss {ours.loss:.4f} and {theirs.loss:.4f}, down by {learned:.2f}",
        counts=stage.quality,
    )


def _fits(base: PreTrainedModel) -> bool:
    """Whether full fine-tuning fits: a copy, its gradients and Adam's two moments, with room."""
    needed = 4 * sum(p.nbytes for p in base.parameters())
    if base.device.type == "cuda":
        free = torch.cuda.mem_get_info(base.device)[0]
    else:
        free = psutil.virtual_memory().available
    return needed < 0.6 * free
