"""``python -m benchmarks.training``: a training step of the demo's model, its time and its memory.

PEFT, the same PEFT model patched, and FastLoRALinear, from the same initial weights. First their
losses and gradients must agree; then steps are timed in turns, and the peak of what a step
allocates is read from torch's own account of it (on a CPU: the profiler's). Prints Markdown.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial

import peft
import torch
from torch import Tensor, nn

import fastlora
from benchmarks import machine
from benchmarks.timer import ratios, spread
from fastlora.demo.methods import SETTINGS
from fastlora.demo.model import clone, small_llama
from fastlora.demo.stage import FULL

VOCABULARY = 256
# Relative norms of gradients summed in another order, or from operands rounded to another dtype.
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}


def models(options: argparse.Namespace, dtype: torch.dtype, dropout: float) -> dict[str, nn.Module]:
    """A model of each kind, with the same numbers."""
    base = small_llama(options.hidden, options.layers, VOCABULARY, seed=0).to(dtype)
    settings = {**SETTINGS, "lora_dropout": dropout}
    found = {
        "PEFT": peft.get_peft_model(clone(base), peft.LoraConfig(**settings)),
        "PEFT, patched": peft.get_peft_model(clone(base), peft.LoraConfig(**settings)),
        "FastLoRALinear": fastlora.replace_linear(clone(base), fastlora.LoRAConfig(**settings)),
    }
    fastlora.patch_peft(found["PEFT, patched"], strict=True)
    for model in found.values():
        draw = torch.Generator().manual_seed(1)
        for parameter in trained(model):
            values = torch.randn(parameter.shape, generator=draw) * parameter.shape[-1] ** -0.5
            parameter.data.copy_(0.3 * values)
        model.to(options.device).train()
    return found


def trained(model: nn.Module) -> list[nn.Parameter]:
    """The adapters' parameters, lora_A before lora_B, layer by layer as the base has them."""
    return [p for p in model.parameters() if p.requires_grad]


def step(model: nn.Module, batch: Tensor, optimizer: torch.optim.Optimizer) -> Tensor:
    loss = model(input_ids=batch, labels=batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def check(found: dict[str, nn.Module], batch: Tensor, tolerance: float) -> None:
    """Raises where a model's loss or gradients are not PEFT's."""
    results = {}
    for name, model in found.items():
        model.eval()  # masks of dropout are drawn differently
        loss = model(input_ids=batch, labels=batch).loss
        gradients = torch.autograd.grad(loss, trained(model))
        flat = [t.detach().flatten() for t in (loss, *gradients)]
        results[name] = torch.cat(flat).double()
        model.train()
    want = results.pop("PEFT")
    for name, got in results.items():
        error = float((got - want).norm() / want.norm())
        if not error <= tolerance:
            raise RuntimeError(
                f"{name}: gradients are {error:.2g} from PEFT's, at most {tolerance}"
            )


def peak(call: Callable[[], object], device: str) -> int:
    """Bytes that a call holds at most beyond those that were held before."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True, acc_events=True) as profile:
        call()
    results = profile.profiler
    assert results is not None
    assert results.kineto_results is not None
    events = [e for e in results.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def timed(
    calls: dict[str, Callable[[], object]], rounds: int, device: str
) -> dict[str, list[float]]:
    """Seconds of each round; the first one, which allocates, is left out."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for turn in range(rounds + 1):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            start = time.perf_counter()
            calls[name]()
            if device == "cuda":
                torch.cuda.synchronize()
            samples[name].append(time.perf_counter() - start)
    return {name: each[1:] for name, each in samples.items()}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("benchmarks.training", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--hidden", type=int, default=FULL.hidden)
    parser.add_argument("--layers", type=int, default=FULL.layers)
    parser.add_argument("--rows", type=int, default=FULL.batch_size)
    parser.add_argument("--length", type=int, default=FULL.length)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    batch = torch.randint(VOCABULARY, (options.rows, options.length), device=options.device)
    print(f"{machine.device_name(options.device)}, {options.threads} threads")
    sizes = f"hidden {options.hidden}, {options.layers} layers"
    print(f"{sizes}, {options.rows} x {options.length} tokens\n")
    print("| base, dropout | model | step / PEFT's (p20 to p80) | peak, MB | of PEFT's |")
    print("|---|---|---|---|---|")
    for dtype in (torch.float32, torch.bfloat16):
        for dropout in (0.0, 0.05):
            found = models(options, dtype, dropout)
            kind = str(dtype).removeprefix("torch.")
            check(found, batch, TOLERANCE[kind])
            calls = {
                name: partial(step, model, batch, torch.optim.AdamW(trained(model), lr=0.0))
                for name, model in found.items()
            }
            samples = timed(calls, options.rounds, options.device)
            peaks = {name: peak(call, options.device) for name, call in calls.items()}
            for name, each in samples.items():
                ratio = spread(ratios(each, samples["PEFT"]))
                print(
                    f"| {kind}, {dropout:g} | {name} | {ratio['p50']:.2f} "
                    f"({ratio['p20']:.2f} to {ratio['p80']:.2f}) | {peaks[name] / 1e6:.1f} "
                    f"| {peaks[name] / peaks['PEFT']:.2f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
