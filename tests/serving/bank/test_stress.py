"""Random steps from several threads: every row is computed with an adapter of its name."""

from __future__ import annotations

import gc
import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import fastlora
from fastlora import LoRAConfig, MultiLoRAModel
from fastlora.serving.bank.entry import Entry
from fastlora.serving.bank.layout import Image
from fastlora.serving.bank.lease import Lease
from tests.support.histories import History, reraise_other_errors
from tests.support.models import randomise_lora
from tests.support.serving.banks import assert_empty

THREADS, STEPS = 4, 500  # of each, twice
NAMES = [f"tenant-{i}" for i in range(12)]
CONTENTS = 20
WIDTH = 24


def base() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, 40), nn.Tanh(), nn.Linear(40, WIDTH, bias=False))
    return model.requires_grad_(False)


class Content:
    """An adapter on disk, and in float64 what it makes of x."""

    def __init__(self, folder: Path, seed: int) -> None:
        torch.manual_seed(seed)
        self.folder, r = folder / str(seed), random.Random(seed).choice([1, 3, 8, 12, 16])
        targets = [["0"], ["2"], ["0", "2"]][seed % 3]
        model = fastlora.replace_linear(base(), LoRAConfig(r=r, target_modules=targets))
        fastlora.save_adapter(randomise_lora(model, 0.5), self.folder)
        self.scaling = 8 / r
        path = self.folder / "adapter_model.safetensors"
        self.tensors = {key: t.double() for key, t in load_file(path).items()}

    def layer(self, name: str, x: Tensor, scale: float) -> Tensor | float:
        key = f"base_model.model.{name}.lora_"
        if f"{key}A.weight" not in self.tensors:
            return 0.0
        A, B = self.tensors[f"{key}A.weight"], self.tensors[f"{key}B.weight"]
        return scale * self.scaling * (x @ A.T) @ B.T


def oracle(model: nn.Module, content: Content | None, x: Tensor, scale: float) -> Tensor:
    """The oracle: row x through the base and an adapter, or none."""
    y = x.double()
    for name, layer in model.named_children():
        if isinstance(layer, nn.Tanh):
            y = y.tanh()
        else:
            added = content.layer(name, y, scale) if content else 0.0
            y = y @ layer.weight.double().T + added
            y = y if layer.bias is None else y + layer.bias.double()
    return y


class Tenants:
    """One thread's random steps against a server that others use too."""

    def __init__(
        self, server: MultiLoRAModel, pool: list[Content], past: History[Content], device: Any
    ) -> None:
        self.server, self.pool, self.past, self.device = server, pool, past, device
        self.plain, self.done = base(), Counter()

    def run(self, seed: int) -> Counter[str]:
        # On a GPU batches of different threads overlap, each on a stream of its own.
        on_gpu = self.device.type == "cuda"
        with torch.cuda.stream(torch.cuda.Stream()) if on_gpu else nullcontext():
            return self.steps(seed)

    def steps(self, seed: int) -> Counter[str]:
        draw = random.Random(seed)
        steps = [self.batch] * 6 + [self.load, self.load, self.unload, self.pin, self.cancel]
        for _ in range(STEPS):
            step = draw.choice(steps)
            self.done[step.__name__] += 1
            step(draw)
        return self.done

    def batch(self, draw: random.Random) -> None:
        named = draw.sample(NAMES, draw.randint(0, 4))
        rows = [draw.choice([None, *named]) for _ in range(draw.randint(1, 6))]
        scales = [draw.choice([1.0, -0.5]) for _ in rows] if draw.random() < 0.5 else None
        x, then = torch.randn(len(rows), WIDTH), self.past.now()
        try:
            y = self.server(x.to(self.device), adapter_names=rows, adapter_scales=scales).cpu()
        except ValueError as error:
            reraise_other_errors(error, "is loaded")
            assert any(None in self.past.since(then, name) for name in rows if name)
            self.done["unknown"] += 1
            return
        except RuntimeError as error:
            reraise_other_errors(error, "leaves no room")
            self.done["no room"] += 1
            return
        meanings = {name: self.past.since(then, name) for name in set(rows) if name}
        for name in set(rows):
            mine = [i for i, row in enumerate(rows) if row == name]
            # One content for all of a name's rows, and it is one that the name had.
            contents = meanings[name] if name else [None]
            assert any(
                all(self.same(y[i], x[i], content, scales[i] if scales else 1.0) for i in mine)
                for content in contents
                if content is not None or name is None
            ), f"{name}: rows {mine} are nobody's that it was"

    def same(self, got: Tensor, x: Tensor, content: Content | None, scale: float) -> bool:
        want = oracle(self.plain, content, x, scale)
        return float((got.double() - want).norm() / want.norm()) <= 1e-5

    def load(self, draw: random.Random) -> None:
        name, content = draw.choice(NAMES), draw.choice(self.pool)
        with self.past.changing(name, content):
            self.server.load_adapter(content.folder, name)

    def unload(self, draw: random.Random) -> None:
        name, wait = draw.choice(NAMES), draw.random() < 0.5
        try:
            with self.past.changing(name, None):
                self.server.unload_adapter(name, wait=wait)
        except RuntimeError as error:
            reraise_other_errors(error, "is in use" if not wait else "nothing")
            self.done["refused"] += 1
        except ValueError as error:
            reraise_other_errors(error, "is loaded")

    def pin(self, draw: random.Random) -> None:
        name = draw.choice(NAMES[:2])
        try:
            (self.server.pin_adapter if draw.random() < 0.5 else self.server.unpin_adapter)(name)
        except ValueError as error:
            reraise_other_errors(error, "is loaded", "is not pinned")
        except RuntimeError as error:
            reraise_other_errors(error, "leaves no room")

    def cancel(self, draw: random.Random) -> None:
        try:
            future = self.server.bank.lease(draw.sample(NAMES, 2))
        except ValueError:
            return
        if draw.random() < 0.5 and future.cancel():
            self.done["cancelled"] += 1
            return
        try:
            future.result(120).release()
        except RuntimeError as error:
            reraise_other_errors(error, "leaves no room")


def count_living(*kinds: type) -> int:
    gc.collect()
    return sum(type(found) in kinds for found in gc.get_objects())


def count_tensor_bytes() -> int:
    gc.collect()
    return sum(count_storage_bytes(t) for t in gc.get_objects() if type(t) is Tensor)


def count_storage_bytes(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage().nbytes()
    except RuntimeError:  # of other tests, one that has none: sparse, a transform's
        return 0


@pytest.mark.parametrize("host_bytes", [20_000, 4 << 30])
def test_concurrent_tenants_never_get_foreign_adapters(tmp_path, host_bytes, device):
    pool = [Content(tmp_path, seed) for seed in range(CONTENTS)]
    server = MultiLoRAModel(
        base().to(device), 6, 16, ["0", "2"], host_bytes=host_bytes, device_bytes=32_000
    )
    before, bytes_before = count_living(Entry, Lease, Image), count_tensor_bytes()
    past: History[Content] = History(NAMES)
    with ThreadPoolExecutor(THREADS) as threads:
        runs = [Tenants(server, pool, past, device).run for _ in range(THREADS)]
        done: Any = sum(threads.map(lambda run, seed: run(seed), runs, range(THREADS)), Counter())
    stats = server.bank.stats()
    assert stats.leases == len(server.bank._shelf.pins)
    # Enough of everything has happened for this to show something.
    assert stats.evictions > 80
    assert (stats.reads > 40) == (host_bytes == 20_000)
    assert done["batch"] - done["unknown"] - done["no room"] > 200
    assert min(done[what] for what in ("load", "unload", "pin", "cancel")) > 40
    assert min(done["refused"], done["cancelled"]) > 0
    for name in server.adapters:
        server.unload_adapter(name)
    assert_empty(server.bank)
    del runs, past, done
    assert count_living(Entry, Lease, Image) <= before  # of other tests some may go meanwhile
    assert count_tensor_bytes() <= bytes_before
