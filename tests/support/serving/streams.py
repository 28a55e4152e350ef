"""A server of adapters, what each request gets alone, and a gate before its forwards."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fastlora
from fastlora import LoRAConfig, MultiLoRAModel
from fastlora.serving import Request
from tests.support.models import randomise_lora, tokens

NAMES = ("one", "two", "three")
# Nothing that a test waits for takes so long; without it a fault would hang instead of fail.
PATIENCE = 120.0


def server_of(build: Callable[[], nn.Module], path: Path) -> MultiLoRAModel:
    """Serves the adapters of NAMES, saved under ``path``, each of which changes every text."""
    server = MultiLoRAModel(build(), max_adapters=4, max_rank=4)
    for seed, name in enumerate(NAMES):
        torch.manual_seed(seed)
        config = LoRAConfig(r=4, target_modules="all-linear", fan_in_fan_out=_is_gpt2(server))
        fastlora.save_adapter(
            randomise_lora(fastlora.replace_linear(build(), config), 0.5), path / name
        )
        server.load_adapter(path / name, name)
    return server


def ask(adapter_name: str | None = "one", new: int = 6, prompt: int = 4, **options) -> Request:
    torch.manual_seed(prompt)
    return Request(
        tokens(prompt), adapter_name, max_new_tokens=new, **{"eos_token_id": ()} | options
    )


def generate_alone(server: MultiLoRAModel, request: Request, **options: Any) -> list[int]:
    """What transformers' own loop writes for this request by itself."""
    ids = torch.tensor([request.input_ids])
    settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0} | options
    whole = server.generate(
        ids,
        adapter_names=[request.adapter_name],
        max_new_tokens=request.max_new_tokens,
        **settings,
    )
    return whole[0, ids.shape[1] :].tolist()


def mixed_requests(**options: Any) -> list[Request]:
    """Requests of many lengths and all adapters, base included; some share one."""
    torch.manual_seed(11)
    shapes = [(3, 8), (17, 12), (9, 3), (25, 5), (5, 1), (1, 9), (12, 6)]
    names = ["one", "two", None, "three", "one", "two", "__base__"]
    return [
        Request(tokens(n), name, max_new_tokens=new, eos_token_id=(), **options)
        for (n, new), name in zip(shapes, names, strict=True)
    ]


class Gate:
    """Stops the engine's forwards: the n-th (from 0) waits until it is opened.

    sizes: how many tokens each forward has had.
    """

    def __init__(self, stop: int | None) -> None:
        self.stop = stop
        self.sizes: list[int] = []
        self.reached, self._open = threading.Event(), threading.Event()

    def open(self) -> None:
        self._open.set()

    def wait(self) -> None:
        assert self.reached.wait(PATIENCE)

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        ids = kwargs["input_ids"]
        if len(self.sizes) == self.stop:
            self.reached.set()
            assert self._open.wait(PATIENCE)
        self.sizes.append(ids.numel())


@contextmanager
def gate_forwards(server: MultiLoRAModel, stop: int | None = None) -> Iterator[Gate]:
    """A gate before every forward within, engines' that were made before."""
    gate = Gate(stop)
    handle = server.model.register_forward_pre_hook(gate, with_kwargs=True)
    try:
        yield gate
    finally:
        gate.open()
        handle.remove()


def _is_gpt2(server: MultiLoRAModel) -> bool:
    return "GPT2" in type(server.model).__name__
