"""Rows of unknown owner are refused until the caller states whose they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastlora
from tests.support.models import error, randomise_lora, untouched
from tests.support.serving.row_servers import CONFIG, Served, build_with_fixed_weights

K = 8


class Tower(nn.Module):
    """Texts, and things of their own number that go to them, through a tower of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.Sequential(nn.Linear(K, K), nn.ReLU(), nn.Linear(K, K))
        self.text, self.head = nn.Linear(K, K), nn.Linear(K, 3)

    def forward(self, x: Tensor, things: Tensor, place: Tensor) -> Tensor:
        seen = self.tower(things).mean(1)
        mine = torch.zeros(len(x), K).index_add(0, place, seen)
        return self.head(self.text(x) + mine[:, None])


class Queries(nn.Module):
    """Learned queries, which are nobody's until they have looked at somebody's text."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(1, 4, K))
        self.reader = Reader()

    def forward(self, x: Tensor) -> Tensor:
        return self.reader(self.queries.expand(len(x), -1, -1), x)


class Reader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.out = nn.Linear(K, K), nn.Linear(K, K), nn.Linear(K, K)

    def forward(self, queries: Tensor, x: Tensor) -> Tensor:
        return self.out(torch.softmax(self.q(queries) @ self.k(x).mT, -1) @ x)


class SequenceFirst(nn.Module):
    """Tokens first, as the caller gives them."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(K, K), nn.Linear(K, K)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.tanh(self.one(x)))


def things() -> tuple[dict[str, Tensor], list[int]]:
    owners = [0, 0, 1]
    given = {"x": torch.randn(3, 5, K), "things": torch.randn(3, 2, K)}
    return given | {"place": torch.tensor(owners)}, owners


@pytest.mark.parametrize("count", [3, 4])
def test_tower_rows_are_the_ones_stated(count, tmp_path):
    served, names = Served(Tower, tmp_path), ["alice", "bob", None]
    given, owners = things()
    if count == 4:
        owners = [2, 0, 0, 1]
        given |= {"things": torch.randn(4, 2, K), "place": torch.tensor(owners)}
    with pytest.raises(RuntimeError, match=r"tower\.0: whose the rows .* adapter_rows=.*'tower'"):
        served.server(**given, adapter_names=names)
    rows = {"tower": owners}
    got = served.server(**given, adapter_names=names, adapter_rows=rows)
    for i, name in enumerate(names):
        mine = [j for j, owner in enumerate(owners) if owner == i]
        part = {
            "x": given["x"][i : i + 1],
            "things": given["things"][mine],
            "place": torch.zeros(len(mine), dtype=torch.long),
        }
        with torch.no_grad():
            assert error(got[i : i + 1], served.alone[name](**part)) < 1e-5
    scales = [0.5, 0.5, 1.0]
    half = served.server(**given, adapter_names=names, adapter_rows=rows, adapter_scales=scales)
    assert error(half, got) > 1e-2
    # Of one adapter's batch every row is known.
    served.server(**given, adapter_names=["alice"] * 3)


def test_stated_rows_hold_in_training():
    model = fastlora.replace_linear(
        build_with_fixed_weights(Tower), CONFIG, adapter_names=["alice", "bob"]
    )
    randomise_lora(model)
    given, owners = things()
    names = ["alice", "bob", None]
    with (
        fastlora.use_adapters(model, names),
        pytest.raises(RuntimeError, match=r"tower\.0: whose the rows"),
    ):
        model(**given)
    with fastlora.use_adapters(model, names, adapter_rows={"tower": owners}):
        model(**given)[0].sum().backward()
    gradients = {
        name: [bool(p.grad.any()) for p in fastlora.adapter_parameters(model, name)]
        for name in ("alice", "bob")
    }
    assert all(gradients["alice"])
    assert not any(gradients["bob"])


def test_learned_queries_are_batch_rows_when_stated(tmp_path):
    refused = Served(Queries, tmp_path / "refused")
    given: dict[str, Tensor] = {"x": torch.randn(3, 3, K)}
    with pytest.raises(RuntimeError, match=r"reader\.q: .*none of the batch's rows"):
        refused.server(**given, adapter_names=["alice", "bob", None])
    served = Served(Queries, tmp_path / "stated", batch_dims={"reader": 0})
    for _ in range(2):
        served.agrees(given, ["alice", "bob", None])


def test_sequence_first_model_is_served_when_stated(tmp_path):
    served = Served(SequenceFirst, tmp_path, batch_dims={"": 1})
    for length in (3, 5):
        x = torch.randn(length, 3, K)
        for _ in range(2):
            got = served.server(x, adapter_names=["alice", "bob", None])
            for i, name in enumerate(["alice", "bob", None]):
                with torch.no_grad():
                    assert error(got[:, i], served.alone[name](x[:, i : i + 1])[:, 0]) < 1e-5
    with pytest.raises(ValueError, match="adapter_names: expected 3, one a row, got 5"):
        served.server(x, adapter_names=[None] * 5)


@pytest.mark.parametrize(
    "stated, kind, says",
    [
        ({"adapter_rows": {"towr": [0]}}, ValueError, "adapter_rows: expected names .* 'towr'"),
        ({"adapter_rows": {"tower": [0, 3, 1]}}, ValueError, "rows of the batch, 0 to 2, got 3"),
        ({"adapter_rows": {"tower": [0, True, 1]}}, ValueError, "0 to 2, got True"),
        ({"adapter_rows": {"tower": 1}}, TypeError, r"adapter_rows\['tower'\]: expected a list"),
        ({"adapter_rows": [0]}, TypeError, "adapter_rows: expected {name"),
        ({"adapter_rows": {"tower": [0, 1]}}, RuntimeError, "each of its 3 rows, got 2"),
        ({"batch_dims": {"nobody": 0}}, ValueError, "batch_dims: expected names .* 'nobody'"),
        ({"batch_dims": {"tower": -1}}, ValueError, r"batch_dims\['tower'\]: expected a dim"),
        ({"batch_dims": {"tower": 1.0}}, ValueError, "got 1.0"),
    ],
)
def test_bad_statements_are_refused_by_name(tmp_path, stated: dict[str, Any], kind, says):
    (given, _), names = things(), ["alice", "bob", None]
    model = fastlora.replace_linear(
        build_with_fixed_weights(Tower), CONFIG, adapter_names=["alice", "bob"]
    )
    with (
        untouched(model),
        pytest.raises(kind, match=says),
        fastlora.use_adapters(model, names, **stated),
    ):
        model(**given)
    if "adapter_rows" in stated:
        served = Served(Tower, tmp_path)
        with pytest.raises(kind, match=says):
            served.server(**given, adapter_names=names, **stated)
    else:
        base = build_with_fixed_weights(Tower)
        with untouched(base), pytest.raises(kind, match=says):
            fastlora.MultiLoRAModel(base, **stated)
