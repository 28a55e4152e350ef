"""Random requests from several threads: every text belongs to an adapter of its name."""

from __future__ import annotations

import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import fastlora
from fastlora import LoRAConfig, MultiLoRAModel
from fastlora.serving import Engine, Request
from tests.support.histories import History, reraise_other_errors
from tests.support.models import llama, quiet, randomise_lora, tokens
from tests.support.serving.banks import assert_empty

pytest.importorskip("transformers")
pytestmark = quiet

THREADS, STEPS = 3, 60
NAMES = ["a", "b", "c", "d", "e", "f"]
NEW = 6
# An adapter, as one knows it: its number.
Texts = dict[tuple[int | None, int], list[int]]


@pytest.fixture(scope="module")
def prompts() -> list[torch.Tensor]:
    torch.manual_seed(5)
    return [tokens(1, n) for n in (2, 5, 9, 14)]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory, prompts: list[torch.Tensor]) -> Any:
    """Folders of adapters, and what each writes after each prompt, alone."""
    folder, found = tmp_path_factory.mktemp("adapters"), {}
    for number in (None, 0, 1, 2, 3, 4):
        model = llama()
        if number is not None:
            torch.manual_seed(number)
            config = LoRAConfig(r=(2, 8, 12)[number % 3], target_modules="all-linear")
            randomise_lora(fastlora.replace_linear(model, config), 0.5)
            fastlora.save_adapter(model, folder / str(number))
        for i, prompt in enumerate(prompts):
            text = model.generate(prompt, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
            found[number, i] = text[0, prompt.shape[1] :].tolist()
    assert len({tuple(text) for text in found.values()}) > len(found) - len(prompts)
    return folder, found


class Clients:
    def __init__(
        self, engine: Engine, server: MultiLoRAModel, folder: Path, texts: Texts,
        prompts: list[torch.Tensor], past: History[int],
    ) -> None:  # fmt: skip
        self.engine, self.server, self.folder = engine, server, folder
        self.texts, self.prompts, self.past = texts, prompts, past
        self.done: Counter[str] = Counter()

    def run(self, seed: int) -> Counter[str]:
        draw = random.Random(seed)
        steps = [self.stream] * 4 + [self.batch, self.load, self.load, self.unload]
        for _ in range(STEPS):
            step = draw.choice(steps)
            self.done[step.__name__] += 1
            step(draw)
        return self.done

    def stream(self, draw: random.Random) -> None:
        """Several requests at once, some of which are cancelled on their way, or dropped."""
        then, asked = self.past.now(), []
        for _ in range(draw.randint(1, 5)):
            name, which = draw.choice([None, *NAMES]), draw.randrange(len(self.prompts))
            request = Request(self.prompts[which], name, max_new_tokens=NEW, eos_token_id=())
            try:
                asked.append((name, which, self.engine.submit(request)))
            except ValueError as error:
                reraise_other_errors(error, "is loaded")
                assert None in self.past.since(then, name)
                self.done["unknown"] += 1
        for name, which, handle in asked:
            end = draw.choice(["read", "read", "cancel", "drop"])
            if end == "drop":
                continue
            got = []
            for token in handle:
                got.append(token)
                if end == "cancel" and len(got) == 2:
                    handle.cancel()
            if handle.finish_reason == "cancelled":
                assert end == "cancel"
                self.done["cancelled"] += 1
            else:
                assert len(got) == NEW
            self.written(then, name, which, got)

    def batch(self, draw: random.Random) -> None:
        names = [draw.choice([None, *NAMES]) for _ in range(3)]
        which, then = draw.randrange(len(self.prompts)), self.past.now()
        ids = self.prompts[which].repeat(3, 1)
        try:
            found = self.server.generate(
                ids, adapter_names=names, attention_mask=torch.ones_like(ids),
                max_new_tokens=NEW, do_sample=False, pad_token_id=0,
            )[:, ids.shape[1] :].tolist()  # fmt: skip
        except ValueError as error:
            reraise_other_errors(error, "is loaded")
            assert any(None in self.past.since(then, name) for name in names if name)
            self.done["unknown"] += 1
            return
        for name, text in zip(names, found, strict=True):
            self.written(then, name, which, text)

    def written(self, then: dict[str, int], name: str | None, which: int, got: list[int]) -> None:
        meant = [None] if name is None else self.past.since(then, name)
        found = [self.texts[m, which][: len(got)] for m in meant if name is None or m is not None]
        assert got in found, f"{name} of {meant} wrote {got}"

    def load(self, draw: random.Random) -> None:
        name, number = draw.choice(NAMES), draw.randrange(5)
        with self.past.changing(name, number):
            self.server.load_adapter(self.folder / str(number), name)

    def unload(self, draw: random.Random) -> None:
        name, wait = draw.choice(NAMES), draw.random() < 0.5
        try:
            with self.past.changing(name, None):
                self.server.unload_adapter(name, wait=wait)
        except RuntimeError as error:
            reraise_other_errors(error, "nothing" if wait else "is in use")
        except ValueError as error:
            reraise_other_errors(error, "is loaded")


def test_concurrent_requests_get_text_of_their_adapter(texts, prompts):
    folder, found = texts
    server = MultiLoRAModel(llama(), max_adapters=3, max_rank=12, host_bytes=30_000)
    past: History[int] = History(NAMES)
    with server.engine(max_rows=4, max_length=32, step_tokens=12) as engine:
        clients = [
            Clients(engine, server, folder, found, prompts, past).run for _ in range(THREADS)
        ]
        with ThreadPoolExecutor(THREADS) as threads:
            done: Any = sum(
                threads.map(lambda run, seed: run(seed), clients, range(THREADS)), Counter()
            )
    assert min(done[what] for what in ("stream", "batch", "load", "unload", "cancelled")) > 5
    stats = server.bank.stats()
    assert stats.leases == 0
    assert min(stats.evictions, stats.reads) > 5
    for name in server.adapters:
        server.unload_adapter(name)
    assert_empty(server.bank)
