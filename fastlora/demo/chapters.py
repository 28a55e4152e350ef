"""The chapters in order: a base model, fine-tuned, compared, saved, served, merged."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastlora.config import LoRAConfig
from fastlora.demo import adapters, compare, corpora, merge, serve
from fastlora.demo.claims import Claims
from fastlora.demo.methods import SETTINGS
from fastlora.demo.model import cut_rows, load_user_model, make_byte_tokenizer, make_small_llama
from fastlora.demo.screen import Screen
from fastlora.demo.settings import FULL, LARGE_MODEL, QUICK, SMALL_MODEL, Domain, Size, Stage
from fastlora.demo.training import Recipe, measure_held_out_loss, train
from fastlora.model.targets import make_plan

PRETRAINING_RATE = 3e-3


@dataclass(frozen=True)
class Scene:
    """Start of a demo. from_user: whether the model is the user's, and trained already."""

    base: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    domains: dict[str, Domain]
    size: Size
    seed: int
    from_user: bool
    quality: bool


def prepare(model: str | None, data: str | None, *, quick: bool, seed: int) -> Scene:
    """Reads or makes model and text, without training.

    Raises FileNotFoundError or ValueError for a path that cannot be used, or too little text.
    """
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    size = QUICK if quick else FULL
    texts = (
        {name: corpora.make_domain_text(name, seed, size.domain_chars) for name in corpora.DOMAINS}
        if data is None
        else {Path(data).stem: corpora.read_file_text(data)}
    )
    if model is None:
        tokenizer = make_byte_tokenizer()
        base = make_small_llama(size.hidden, size.layers, len(tokenizer), seed)
    else:
        base, tokenizer = load_user_model(model)
    make_plan(base, LoRAConfig(**SETTINGS))  # says so when there is nothing to put LoRA into
    length = min(size.length, getattr(base.config, "max_position_embeddings", size.length))
    domains = {}
    for name, text in texts.items():
        train_rows = cut_rows(tokenizer, text.train, length)
        held_out = cut_rows(tokenizer, text.held_out, length)[: size.held_out]
        if len(train_rows) < size.batch_size or not len(held_out):
            needed, row_count = 8 * length * size.batch_size, len(train_rows) + len(held_out)
            raise ValueError(
                f"data: expected at least {needed:,} tokens, some to learn from and some to hold "
                f"out, got about {row_count * length:,} in {data or name}"
            )
        domains[name] = Domain(train_rows, held_out)
    quality = model is None and data is None and not quick
    return Scene(base, tokenizer, domains, size, seed, model is not None, quality)


def tell(scene: Scene) -> int:
    """Runs every chapter and lists the claims; returns the exit code."""
    size, claims, start = scene.size, Claims(), time.perf_counter()
    with tempfile.TemporaryDirectory() as directory, Screen() as screen:
        stage = Stage(
            base=scene.base,
            tokenizer=scene.tokenizer,
            domains=scene.domains,
            rates=LARGE_MODEL if scene.from_user else SMALL_MODEL,
            recipe=Recipe(size.steps, size.batch_size, scene.seed),
            size=size,
            directory=Path(directory),
            screen=screen,
            claims=claims,
            quality=scene.quality,
        )
        # A run of each method, PEFT's, and an adapter for each domain that has none yet.
        runs = len(compare.choose_methods(stage)) + 1 + len(stage.domains) - 1
        screen.expect(runs * size.steps + (0 if scene.from_user else size.pretraining_steps))
        _introduce(stage, scene)
        _tell_chapters(stage)
        screen.chapter("What was claimed")
        screen.show_claims(claims.every)
        screen.say(f"\n{time.perf_counter() - start:.0f} s on {torch.get_num_threads()} threads")
    return claims.exit_code


def _tell_chapters(stage: Stage) -> None:
    first = next(iter(stage.domains))
    ours = compare.compare(stage, first)
    compare.compare_with_peft(stage, first, ours)
    probes = adapters.train_all(stage, {first: ours})
    if len(stage.domains) > 1:
        adapters.compare_on_domains(stage)
    in_peft = adapters.reopen_in_peft(stage, probes)
    serve.serve(stage, probes, in_peft)
    merge.merge(stage, first, probes[first])


def _introduce(stage: Stage, scene: Scene) -> None:
    """Describes the base model; pre-trains it in place where it is the small Llama."""
    screen, size, base = stage.screen, scene.size, stage.base
    screen.chapter("The base model")
    what = f"{type(base).__name__}, {sum(p.numel() for p in base.parameters()):,} parameters"
    if scene.from_user:
        screen.say(f"{what}, from {base.config.name_or_path}")
        return
    text = corpora.make_pretraining_text(scene.seed, size.pretraining_chars)
    tokens = cut_rows(stage.tokenizer, text, size.length)
    seen, unseen = tokens[size.held_out :], tokens[: size.held_out]
    before = measure_held_out_loss(base, unseen)
    screen.announce("pre-training on text that comes with Python")
    recipe = Recipe(size.pretraining_steps, size.batch_size, scene.seed)
    run = train(base, seen, PRETRAINING_RATE, recipe, screen.advance)
    screen.say(
        f"{what}, a token a byte.\n"
        "Pre-trained on pydoc's topics and the standard library's sources:\n"
        f"{size.pretraining_steps} steps of {size.batch_size} × {size.length} bytes, "
        f"{run.step_seconds * 1e3:.0f} ms each; held-out loss {before:.2f} → "
        f"{measure_held_out_loss(base, unseen):.2f}."
    )
