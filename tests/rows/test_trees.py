"""In random call trees no layer takes one row for another's, however rows move."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastlora
from fastlora import LoRAConfig, MultiLoRAModel
from fastlora.modules.routing import Routing

K = 8


class Node(nn.Module):
    """A few steps on x and, beside it, on whose each of x's elements is."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.steps = [random.choice(STEPS) for _ in range(random.randint(4, 8))]
        self.layers = nn.ModuleList([nn.Linear(K, K) for _ in self.steps])
        self.children_ = nn.ModuleList([Node(depth - 1) for _ in self.steps] if depth else [])
        self.seed, self.odd = random.random(), False

    def forward(self, x: Tensor, who: Tensor, tower: Tensor) -> tuple[Tensor, Tensor]:
        for i, step in enumerate(self.steps):
            if step == "layer":
                y = self.layers[i](x)
                note(who.expand(x.shape)[..., 0].clone())
                x = x + y
            elif step == "child" and len(self.children_):
                x, who = self.children_[i](x, who, tower)
            elif step == "tower":
                # Rows of their own, as many as the batch's: nobody's here.
                y = self.layers[i](tower)
                note(torch.full(tower.shape[:-1], -9))
                x = x + y.mean()
            else:
                x, who = move_rows(step, x, who.expand(x.shape), self.seed, self.odd)
        return x, who


# Whose the rows of each layer that has run are.
LOG: list[Tensor] = []


def note(who: Tensor) -> None:
    LOG.append(who)


STEPS = [
    "layer", "layer", "layer", "layer", "layer", "child", "child", "turn", "drop", "order",
    "by value", "flatten", "swap", "write", "pad", "branch", "attend", "state", "tower",
    "index by mask", "repeat",
]  # fmt: skip


def move_rows(step: str, x: Tensor, who: Tensor, seed: float, odd: bool) -> tuple[Tensor, Tensor]:
    n = len(x)
    order = list(range(n))
    random.Random(seed).shuffle(order)
    if step == "turn" and x.dim() > 2:
        return x.transpose(0, 1), who.transpose(0, 1)
    if step == "drop" and n > 2:
        return x[1:], who[1:]
    if step == "order":
        return x[order], who[order]
    if step == "by value":
        places = x.flatten(1).sum(1).argsort()
        return x[places], who[places]
    if step == "flatten" and x.dim() > 2:
        return x.reshape(-1, K), who.reshape(-1, K)
    if step == "swap":
        return torch.cat([x[n // 2 :], x[: n // 2]]), torch.cat([who[n // 2 :], who[: n // 2]])
    if step == "write" and n > 1:
        x, who = x.clone(), who.clone()
        x[0], who[0] = x[-1].clone(), who[-1].clone()
        return x, who
    if step == "pad" and x.dim() > 2:
        pad = torch.zeros(1, K).expand(x.shape[0], 1, K)
        return torch.cat([x, pad], 1), torch.cat([who, who[:, :1]], 1)
    if step == "branch" and bool(x.sum() > 0):
        return x.flip(0), who.flip(0)
    if step == "attend" and x.dim() > 2:
        return torch.softmax(x @ x.transpose(1, 2), -1) @ x, who
    if step == "state" and odd:
        return x.roll(1, 0), who.roll(1, 0)
    if step == "index by mask":
        mask = torch.arange(n) % 2 == 0
        return torch.cat([x[mask], x[~mask]]), torch.cat([who[mask], who[~mask]])
    if step == "repeat":
        return x.repeat_interleave(2, 0), who.repeat_interleave(2, 0)
    return x, who


@pytest.fixture
def slots_seen_by_layers(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The slot of each row and token of every layer that ran."""
    found: list[Tensor] = []
    before = Routing.make_groups

    def make_groups(self: Routing, rows: Any, x: Tensor) -> Any:
        groups = before(self, rows, x)
        found.append(groups.ids.view(x.shape[:-1]).clone())
        return groups

    monkeypatch.setattr(Routing, "make_groups", make_groups)
    return found


@pytest.mark.parametrize("kind", ["served", pytest.param("trained", marks=pytest.mark.full)])
def test_no_layer_sees_a_foreign_row(kind, slots_seen_by_layers):
    served = refused = 0
    for seed in range(TREES):
        random.seed(seed)
        torch.manual_seed(seed)
        model, rows = Node(random.choice((1, 2))), random.choice((2, 3, 4))
        names = [None, "a", "b", "c"][:rows]
        if kind == "served":
            server = MultiLoRAModel(model)
            slots = [-1, 0, 1, 2][:rows]
        else:
            fastlora.replace_linear(
                model, LoRAConfig(r=1, target_modules="all-linear"), adapter_names=["a", "b", "c"]
            )
        for turn in range(3):
            x, tower = torch.randn(rows, rows, K), torch.randn(rows, rows, K)
            who = torch.arange(rows)[:, None, None]
            for node in model.modules():
                node.odd = turn == 2
            LOG.clear()
            slots_seen_by_layers.clear()
            try:
                with torch.no_grad():
                    if kind == "served":
                        with server.running(slots):
                            model(x, who, tower)
                    else:
                        with fastlora.use_adapters(model, names):
                            model(x, who, tower)
            except RuntimeError as error:
                refused += "is not known" in str(error)
            served += len(LOG)
            assert len(slots_seen_by_layers) >= len(LOG)
            for got, of in zip(slots_seen_by_layers, LOG, strict=False):
                # Nobody's own slot is -1, so is the first row's: a tower's must not be answered.
                assert torch.equal(got.long(), of - 1), (seed, turn)
    # Neither all nor nothing.
    assert served > 4 * TREES
    assert refused < 2 * TREES


TREES = 25
