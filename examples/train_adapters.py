"""Four adapters trained at once on one base, beside a run for each: the same losses, in less time.

A small Llama learns text that comes with CPython, then an adapter each four domains. In every round
all adapters take a step together in one batch, then each takes the same step alone, and each in
PEFT; the losses of all three must stay together.

    python examples/train_adapters.py [--rows 2] [--length 64] [--steps 40] [--hidden 256]
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable

import peft
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as nnf

import fastlora
from fastlora.demo.corpora import DOMAINS, make_domain_text, make_pretraining_text
from fastlora.demo.model import clone, cut_rows, make_byte_tokenizer, make_small_llama

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# Adam divides by what may be tiny, so that differences of rounding grow from step to step.
TOLERANCE = 2e-3


def compute_row_losses(model: nn.Module, ids: Tensor) -> Tensor:
    """Computes nats a token of each row (rows,)."""
    logits = model(input_ids=ids).logits
    each = nnf.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return each.view(len(ids), -1).mean(1)


def make_step(model: nn.Module, rate: float) -> Callable[[Tensor], None]:
    """Makes a function that takes one optimizer step down a loss."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate)

    def step(loss: Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def pretrain(model: nn.Module, blocks: Tensor, steps: int, batch: int = 16) -> None:
    step = make_step(model.train(), 2e-3)
    for i in range(steps):
        at = i * batch % max(1, len(blocks) - batch)
        step(compute_row_losses(model, blocks[at : at + batch]).mean())


class Together:
    """One model, trained with every domain's rows in one batch."""

    def __init__(self, base: nn.Module, config: peft.LoraConfig, names: list[str], rate: float):
        self.model = fastlora.replace_linear(clone(base), config, adapter_names=names).train()
        self.names, self.step = names, make_step(self.model, rate)

    def train(self, batches: dict[str, Tensor]) -> dict[str, float]:
        owners = [name for name in self.names for _ in batches[name]]
        ids = torch.cat([batches[name] for name in self.names])
        with fastlora.use_adapters(self.model, owners):
            losses = compute_row_losses(self.model, ids).view(len(self.names), -1).mean(1)
            # Each adapter's own loss: their sum gives each the gradients that it would get alone.
            self.step(losses.sum())
        return dict(zip(self.names, losses.tolist(), strict=True))


class Apart:
    """Models, one for each domain, trained in turn."""

    def __init__(self, models: dict[str, nn.Module], rate: float):
        self.models = models
        self.steps = {name: make_step(model.train(), rate) for name, model in models.items()}

    def train(self, batches: dict[str, Tensor]) -> dict[str, float]:
        losses = {}
        for name, model in self.models.items():
            loss = compute_row_losses(model, batches[name]).mean()
            self.steps[name](loss)
            losses[name] = loss.item()
        return losses


def make_runs(
    base: nn.Module, names: list[str], rank: int, rate: float
) -> dict[str, Together | Apart]:
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=TARGETS)
    together = Together(base, config, names, rate)
    ours, theirs = {}, {}
    for name in names:
        ours[name] = fastlora.replace_linear(clone(base), config)
        theirs[name] = peft.get_peft_model(clone(base), config)
        start = fastlora.adapter_state_dict(together.model, name)
        with torch.no_grad():
            for key, parameter in fastlora.adapter_state_dict(ours[name]).items():
                parameter.copy_(start[key])
        peft.set_peft_model_state_dict(theirs[name], start)
    return {"together": together, "alone": Apart(ours, rate), "peft": Apart(theirs, rate)}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=2, help="of each domain in a batch")
    parser.add_argument("--length", type=int, default=64, help="tokens a row")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--pretraining", type=int, default=60, help="steps of the base before")
    parser.add_argument("--hidden", type=int, default=256, help="a multiple of 32")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()

    names, tokenizer = list(DOMAINS), make_byte_tokenizer()
    base = make_small_llama(options.hidden, options.layers, len(tokenizer), seed=0)
    pretrain(base, cut_rows(tokenizer, make_pretraining_text(0, 200_000), 128), options.pretraining)
    characters = options.rows * options.length * options.steps
    data = {
        name: cut_rows(tokenizer, make_domain_text(name, 0, 2 * characters).train, options.length)
        for name in names
    }
    runs = make_runs(base, names, options.rank, options.rate)
    seconds: dict[str, list[float]] = {way: [] for way in runs}
    history: dict[str, list[dict[str, float]]] = {way: [] for way in runs}
    for i in range(options.steps):
        at = slice(i * options.rows, (i + 1) * options.rows)
        batches = {name: blocks[at] for name, blocks in data.items()}
        for way, run in runs.items():
            start = time.perf_counter()
            history[way].append(run.train(batches))
            seconds[way].append(time.perf_counter() - start)

    print(
        f"{len(names)} adapters of rank {options.rank}, {options.rows} rows of {options.length} "
        f"tokens each, {options.steps} steps, hidden {options.hidden}, {options.threads} threads"
    )
    print(f"{'loss':<10} {'first':>7} {'together':>9} {'alone':>7} {'peft':>7}   apart at most")
    worst = 0.0
    for name in names:
        apart = max(
            abs(mine[name] - other[name]) / other[name]
            for way in ("alone", "peft")
            for mine, other in zip(history["together"], history[way], strict=True)
        )
        worst = max(worst, apart)
        last = "  ".join(f"{history[way][-1][name]:6.3f}" for way in runs)
        print(f"{name:<10} {history['alone'][0][name]:7.3f}   {last}   {apart:.0e}")
    medians = {way: sorted(times)[len(times) // 2] for way, times in seconds.items()}
    for way, median in medians.items():
        print(
            f"{way:<10} {1e3 * median:7.1f} ms a step of all   {medians['alone'] / median:5.2f} "
            f"times as fast as the runs alone   {medians['peft'] / median:5.2f} as PEFT"
        )
    if worst > TOLERANCE:
        raise SystemExit(f"the losses drifted apart by {worst:.0e}, more than {TOLERANCE:.0e}")


if __name__ == "__main__":
    main()
