"""What a class's source says it does with the modules under it."""

from __future__ import annotations

import functools

import torch
from torch import nn
from torch.nn import functional as F

from fastlora.inspection.sources import read_uses


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(4, 4) for _ in range(4))
        self.many = nn.ModuleList([nn.Linear(4, 4)])
        nn.init.zeros_(self.a.weight)  # no forward comes here

    def reset(self):
        return self.a.weight.sum()

    def forward(self, x):
        return F.linear(x, self.a.weight)


def uses(forward, base=Base, **more):
    """Of a class with that forward, and further methods."""
    found = read_uses(type("Made", (base,), {"forward": forward, **more}))
    assert found is not None
    return found


def read(forward, **more):
    return set(uses(forward, **more).read)


def test_read_uses_finds_weight_however_reached():
    def forward(self, x):
        layer = self.b
        w = self.c.weight
        y = x @ layer.weight.t() + F.linear(x, weight=w.T)
        for each in self.many:
            y = torch.cat((y, each.weight))
        rows = [w.sum() for w in (other.weight for _, other in enumerate(self.many))]
        return y, rows, getattr(self, "d").weight[:, 1:], self.of_a, self.deep()  # noqa: B009

    more = {"of_a": property(_of_a), "deep": _deep}
    found = uses(forward, **more)
    assert set(found.read) >= {("b",), ("c",), ("d",), ("many", "*"), ("many", "*", "x", "proj")}
    assert found.read["many", "*", "x", "proj"] == "deep"
    assert not found.called & set(found.read)


def _of_a(self):
    return self.a.weight.detach()


def _deep(self):
    return F.linear(self.many[0].x.proj.weight, self.a.bias)


def test_read_uses_ignores_attributes_only_inspected():
    def forward(self, x):
        kind = self.a.weight.dtype
        w = self.b.weight
        if self.c.weight is None or not isinstance(self.d.weight, torch.Tensor) or w.is_cuda:
            self.a.weight = None
            self.a.weight.data = x
        x = x.to(self.a.weight).to(kind).view(w.shape[0], self.b.weight.size(1)).type_as(w)
        print(f"{self.a.weight}", len(self.b.weight), torch.zeros_like(self.c.weight))
        return x, self.a.bias, self.a.weight.new_zeros(3), self.b.weight.data.dtype, w.data.device

    assert read(forward) == set()


def test_read_uses_follows_only_calls_from_forward():
    def forward(self, x):
        return self.b(x)

    assert read(forward) == set()  # the forward of Base is another
    assert read_uses(Base).read == {("a",): "forward"}

    class Below(Base):
        def forward(self, x):
            return self.a(super().forward(x))

    assert read_uses(Below).read == {("a",): "forward"}
    assert ("a",) in read_uses(Below).called


def test_read_uses_tells_called_from_handed_on():
    def forward(self, x):
        x = self.a(self.b.forward(x))
        for i, layer in enumerate(self.many):
            x = layer(x) if i else self.function(self.c.__call__, x)
        return self.function(self.d, x)

    found = uses(forward)
    assert found.called >= {("a",), ("b",), ("many", "*")}
    assert found.handed >= {("c",), ("d",)}
    assert not found.handed & {(), ("many",), ("many", "*"), ("a",), ("b",)}

    def forward(self, x):
        return [function(self, x) for function in self.many], list(self.children())

    assert uses(forward).handed >= {(), ("*",)}


def test_read_uses_knows_nothing_without_source():
    made: dict = {}
    exec("def forward(self, x):\n    return x @ self.a.weight", made)
    for forward in (made["forward"], functools.partialmethod(Base.forward)):
        assert read_uses(type("Made", (Base,), {"forward": forward})) is None
    assert read_uses(nn.Linear) is not None
