"""Rows of a layer are routed to their adapters even where their number says nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastlora
from fastlora import LoRAConfig
from tests.support.models import error, randomise_lora
from tests.support.serving.row_servers import CONFIG, Served

K, B = 8, 3
NAMES = ["alice", "bob", None]


class Turned(nn.Module):
    """Tokens first within, as many as the batch has rows; dropped, reordered and back."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.flat, self.out = (nn.Linear(K, K) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x.transpose(0, 1)).transpose(0, 1)
        some = self.flat(y[1:].flip(0).reshape(-1, K)).view(len(x) - 1, -1, K).flip(0)
        return self.out(torch.cat([y[:1], some]))


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(K, K), nn.Linear(K, K)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.tanh(self.one(x)))


class Kept(Plain):
    """Turns its rows over each second time, by itself."""

    turned = False

    def forward(self, x: Tensor) -> Tensor:
        self.turned = not self.turned
        return (
            super().forward(x if self.turned else x.flip(0)) if len(x) > 1 else super().forward(x)
        )


def output_of_each_row(served: Served, x: Tensor, kind: type[nn.Module]) -> list[Tensor]:
    with torch.no_grad():
        if kind is not Turned:
            return [served.alone[name](x[i : i + 1])[0] for i, name in enumerate(NAMES)]
        whole = [served.alone[name](x) for name in NAMES]
        return [out[i] for i, out in enumerate(whole)]


@pytest.mark.parametrize("kind, compiled", [
    (Turned, False), (Turned, True), (Plain, False),
    pytest.param(Plain, True, marks=pytest.mark.full),
])  # fmt: skip
def test_routing_holds_with_tokens_as_many_as_rows(kind, compiled, tmp_path):
    served, x = Served(kind, tmp_path), torch.randn(B, B, K)
    if compiled:
        served.server.model = torch.compile(served.server.model, backend="eager")
    for _ in range(3):
        got = served.server(x, adapter_names=NAMES)
        for row, want in zip(got, output_of_each_row(served, x, kind), strict=True):
            assert error(row, want) < 1e-5
    trained = fastlora.replace_linear(kind(), CONFIG, adapter_names=["alice", "bob"])
    randomise_lora(trained)
    run: Any = torch.compile(trained, backend="eager") if compiled else trained
    for _ in range(2):
        trained.zero_grad()
        with fastlora.use_adapters(trained, NAMES):
            run(x)[2].sum().backward()
        for name in ("alice", "bob"):
            for parameter in fastlora.adapter_parameters(trained, name):
                assert parameter.grad is None or not parameter.grad.any()


def test_stateful_model_is_checked_at_each_call(tmp_path):
    served, x = Served(Kept, tmp_path), torch.randn(B, 2, K)
    for _ in range(3):
        got = served.server(x, adapter_names=NAMES)
        if served.server.model.turned:
            rows = zip(got, output_of_each_row(served, x, Kept), strict=True)
        else:
            rows = zip(got.flip(0), output_of_each_row(served, x, Kept), strict=True)
        assert all(error(row, want) < 1e-5 for row, want in rows)
    assert not served.server.rows.verdicts.by_key


class Twice(nn.Module):
    """One layer, run again in backward, with other rows each time; or with the same."""

    def __init__(self, turned: bool) -> None:
        super().__init__()
        self.layer, self.turned = nn.Linear(K, K), turned

    def forward(self, x: Tensor) -> Tensor:
        y: Any = checkpoint(self.layer, x, use_reentrant=False)
        y = y.flip(0) if self.turned else y
        return checkpoint(self.layer, y, use_reentrant=False)


def test_recomputed_layer_has_rows_of_its_forward():
    x = torch.randn(B, B, K)
    for turned in (False, True):
        model = Twice(turned)
        fastlora.replace_linear(model, CONFIG, adapter_names=["alice", "bob"])
        with fastlora.use_adapters(model, NAMES):
            loss = model(x).square().sum()
            if turned:
                with pytest.raises(RuntimeError, match="ran with other rows in turn"):
                    loss.backward()
            else:
                loss.backward()


def test_layer_called_outside_its_model_is_refused():
    model = nn.Sequential(Plain(), nn.Linear(K, K))
    config = LoRAConfig(r=2, target_modules=["one", "two"])
    fastlora.replace_linear(model, config, adapter_names=["alice", "bob"])
    x = torch.randn(B, 2, K)
    with fastlora.use_adapters(model, NAMES):
        want = model[0](x)
        assert torch.equal(model[0].two(torch.tanh(model[0].one(x))), want)
        with pytest.raises(RuntimeError, match="reached past the model's own call"):
            model[0].forward(x)


def test_call_after_an_error_begins_anew(tmp_path):
    served, x = Served(Plain, tmp_path), torch.randn(B, 2, K)
    with pytest.raises(ValueError, match="x: expected shape"):
        served.server(x[..., 1:], adapter_names=NAMES)
    got = served.server(x, adapter_names=NAMES)
    assert all(
        error(row, want) < 1e-5
        for row, want in zip(got, output_of_each_row(served, x, Plain), strict=True)
    )


class Dropping(Plain):
    """Leaves a layer out at random, as layer dropout does."""

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x) if drawn() else x)


DRAWN = [0]


def drawn() -> int:
    return DRAWN[0]


def test_randomly_dropping_model_is_checked_each_call(tmp_path):
    served, x = Served(Dropping, tmp_path), torch.randn(B, 2, K)
    served.server(x, adapter_names=NAMES)
    DRAWN[0] = 1
    for _ in range(2):
        got = served.server(x, adapter_names=NAMES)
        rows = zip(got, output_of_each_row(served, x, Dropping), strict=True)
        assert all(error(row, want) < 1e-5 for row, want in rows)


def test_torch_modes_leave_the_stack_after_calls(tmp_path):
    """Of a first forward that is watched for two things at once, and of one that is refused."""
    served, x = Served(Turned, tmp_path), torch.randn(B, 2, K)
    depth = torch._C._len_torch_function_stack(), torch._C._len_torch_dispatch_stack()
    with torch.no_grad(), served.server.running([0, 1, -1]):
        served.server.model(x)
        with pytest.raises(RuntimeError, match="expected 3 rows first"):
            served.server.model(torch.randn(7, 2, K))
    assert (torch._C._len_torch_function_stack(), torch._C._len_torch_dispatch_stack()) == depth


class Recurrent(nn.Module):
    """torch's own turns its result in place, as many tokens as rows or not."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.out = nn.GRU(K, K, batch_first=True), nn.Linear(K, K)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.cell(x)[0])


class Summed(Plain):
    """A row of the sum is two rows'."""

    def forward(self, x: Tensor) -> Tensor:
        where = torch.tensor([0, 0, 1]).view(-1, 1, 1).expand_as(x)
        return self.two(torch.zeros_like(x).scatter_add(0, where, self.one(x)))


class Beside(Plain):
    """A row that nobody has marked, beside one that is."""

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.stack([x[0], *torch.from_numpy(x[1:].numpy().copy())]))


class Lost(Plain):
    """Called with tokens first; after an op that nobody knows, whose they are is lost."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.one(x).transpose(0, 1).contiguous()
        return self.two(h.slice_scatter(h[:1], 0, 0, 1)).transpose(0, 1)


def test_routing_follows_results_transposed_in_place(tmp_path):
    served = Served(Recurrent, tmp_path)
    for length in (B, 2):
        x = torch.randn(B, length, K)
        got = served.server(x, adapter_names=NAMES)
        for row, want in zip(got, output_of_each_row(served, x, Recurrent), strict=True):
            assert error(row, want) < 1e-5


@pytest.mark.parametrize(
    "kind, options", [(Summed, {}), (Beside, {}), (Lost, {"batch_dims": {"": 1}})]
)
def test_rows_of_unknown_owner_are_refused(kind, options, tmp_path):
    served = Served(kind, tmp_path, **options)
    with pytest.raises(RuntimeError, match="is not known"):
        served.server(torch.randn(B, B, K), adapter_names=NAMES)


def test_routing_notices_hook_registered_later(tmp_path):
    """On modules of torch's own, of which nothing else is looked at twice."""
    served = Served(lambda: nn.Sequential(nn.Linear(K, K), nn.Tanh(), nn.Linear(K, K)), tmp_path)
    x = torch.randn(B, 2, K)
    for _ in range(2):
        served.server(x, adapter_names=NAMES)
    assert served.server.rows.verdicts.by_key
    served.server.model[1].register_forward_hook(lambda module, args, y: y.flip(0))
    got = served.server(x, adapter_names=NAMES)
    with torch.no_grad():
        for i, name in enumerate(NAMES):
            one, _, two = served.alone[name]
            assert error(got[B - 1 - i], two(torch.tanh(one(x[i])))) < 1e-5
