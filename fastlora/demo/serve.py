"""Serving of all adapters and the base in one batch, timed beside PEFT."""

from __future__ import annotations

import statistics
import textwrap
import time
from typing import Any

import peft
import torch
from torch import Tensor

import fastlora
from fastlora.demo.adapters import SAME_LOGITS, Probe, compute_distance
from fastlora.demo.methods import SETTINGS
from fastlora.demo.model import clone
from fastlora.demo.settings import Stage

PROMPT = "\n"
ROWS_AN_ADAPTER = 2  # in the timed batch
SAMPLE_LINES, SAMPLE_WIDTH = 5, 78
TEMPERATURE = 0.5


def serve(stage: Stage, probes: dict[str, Probe], theirs: peft.PeftModel) -> None:
    """Mixes all adapters in a batch, shows what each writes, times generation beside PEFT."""
    stage.screen.chapter("One batch, every adapter and the base")
    stage.screen.announce("serving")
    server = fastlora.MultiLoRAModel(
        clone(stage.base), max_adapters=len(stage.domains), max_rank=SETTINGS["r"]
    )
    for name in stage.domains:
        server.load_adapter(stage.adapter_folder(name), adapter_name=name)
    _check_mixed_batch(stage, server, probes)
    _show_samples(stage, server)
    _time_generation(stage, server, theirs)


def _check_mixed_batch(
    stage: Stage, server: fastlora.MultiLoRAModel, probes: dict[str, Probe]
) -> None:
    """Claims that a row in a mixed batch gets what its adapter alone would give it."""
    names = [*probes, None]
    first = next(iter(probes.values()))
    batch = torch.cat([probe.row for probe in probes.values()] + [first.row])
    mixed = server(input_ids=batch.to(stage.base.device), adapter_names=names).logits
    errors = [p.error(row[None]) for p, row in zip(probes.values(), mixed[:-1], strict=True)]
    errors.append(compute_distance(mixed[-1:], first.base))
    effects = [probe.effect for probe in probes.values()]
    stage.screen.table(
        ["row of the batch", "off its adapter alone by", "off the base by"],
        [
            [name or "base model", f"{error:.1e}", f"{effect:.1e}"]
            for name, error, effect in zip(names, errors, [*effects, errors[-1]], strict=True)
        ],
    )
    stage.claims.check(
        "in one mixed batch every row equals its adapter run alone",
        max(errors) <= SAME_LOGITS and min(effects) >= 10 * SAME_LOGITS,
        f"off by {max(errors):.0e} of the largest logit, the base by {min(effects):.0e}",
    )


def _show_samples(stage: Stage, server: fastlora.MultiLoRAModel) -> None:
    """Prints how the base and each adapter continue an empty line, all in one batch."""
    names = [None, *stage.domains]
    prompt = torch.tensor([stage.tokenizer(PROMPT, add_special_tokens=False)["input_ids"]])
    torch.manual_seed(stage.recipe.seed)
    written = server.generate(
        **_make_inputs(stage, prompt.repeat(len(names), 1)),
        **_limit_tokens(3 * stage.size.new_tokens),
        adapter_names=names,
        do_sample=True,
        temperature=TEMPERATURE,
    )
    stage.screen.say("\nWhat each writes after an empty line:")
    for name, tokens in zip(names, written, strict=True):
        text = str(stage.tokenizer.decode(tokens[prompt.shape[1] :]))
        lines = [line for line in textwrap.dedent(text).splitlines() if line.strip()]
        stage.screen.say("")
        for i, line in enumerate(lines[:SAMPLE_LINES] or ["(only blanks)"]):
            label = "" if i else name or "base model"
            stage.screen.say(f"  {label:<12}{line[:SAMPLE_WIDTH]}")


def _time_generation(stage: Stage, server: fastlora.MultiLoRAModel, theirs: peft.PeftModel) -> None:
    """Prints tokens a second of both, generating the same mixed batch in turns."""
    stage.screen.announce("generating, in turns with PEFT")
    names = [*stage.domains, None] * ROWS_AN_ADAPTER
    prompt = torch.cat([d.held_out[:1, :16] for d in stage.domains.values()])
    prompt = torch.cat([prompt, prompt[:1]]).repeat(ROWS_AN_ADAPTER, 1)
    call = _make_inputs(stage, prompt) | _limit_tokens(stage.size.new_tokens) | {"do_sample": False}
    tokens = len(names) * stage.size.new_tokens
    servers: dict[str, tuple[Any, list[str | None]]] = {
        "fastlora": (server, names),
        "PEFT, adapter_names": (theirs, [name or "__base__" for name in names]),
    }
    seconds: dict[str, list[float]] = {name: [] for name in servers}
    for _ in range(3):
        for name, (model, adapters) in servers.items():
            start = time.perf_counter()
            model.generate(**call, adapter_names=adapters)
            seconds[name].append(time.perf_counter() - start)
    speed = {name: tokens / statistics.median(s) for name, s in seconds.items()}
    stage.screen.say("")
    stage.screen.table(
        [f"generating {len(names)} rows of {stage.size.new_tokens} tokens", "tokens/s"],
        [[name, f"{value:,.0f}"] for name, value in speed.items()],
    )


def _make_inputs(stage: Stage, prompt: Tensor) -> dict[str, Tensor]:
    prompt = prompt.to(stage.base.device)
    return {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}


def _limit_tokens(count: int) -> dict[str, Any]:
    """Returns options for exactly ``count`` new tokens, even past one that ends the text."""
    return {"max_new_tokens": count, "min_new_tokens": count, "pad_token_id": 0}
