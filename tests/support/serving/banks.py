"""Banks without a model, and adapters that a test lets be read when it wants."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastlora import functional as F
from fastlora.serving import AdapterBank, Factors, Layout

# Of layers of two shapes, neither a multiple of anything.
SHAPES = {"one": (31, 43), "two": (17, 63), "three": (31, 43)}


def layout(max_rank: int = 16, dtype: torch.dtype = torch.float32) -> Layout:
    device = torch.device("cpu")
    return Layout({name: (N, K, device, dtype) for name, (N, K) in SHAPES.items()}, max_rank)


def bank(max_adapters: int = 2, max_rank: int = 16, **options: Any) -> AdapterBank:
    return AdapterBank(layout(max_rank), max_adapters, **options)


class Adapter:
    """Signed numbers for some layers; ``read`` counts, and waits or fails as it is told."""

    def __init__(self, seed: int, r: int | Mapping[str, int] = 8, scaling: float = 0.5) -> None:
        ranks = r if isinstance(r, Mapping) else dict.fromkeys(SHAPES, r)
        draw = torch.Generator().manual_seed(seed)
        self.factors = {
            name: Factors(
                torch.randn(rank, SHAPES[name][1], generator=draw),
                torch.randn(SHAPES[name][0], rank, generator=draw),
                scaling * (1 + i),
            )
            for i, (name, rank) in enumerate(ranks.items())
        }
        self.reads = 0
        self.may_read = threading.Event()
        self.may_read.set()
        self.error: Exception | None = None

    def __call__(self) -> dict[str, Factors]:
        self.reads += 1
        assert self.may_read.wait(60)
        if self.error is not None:
            raise self.error
        return self.factors

    def __deepcopy__(self, memo: object) -> Adapter:
        return self

    def delta(self, layer: str, x: Tensor) -> Tensor:
        if layer not in self.factors:
            return x.new_zeros(len(x), SHAPES[layer][0], dtype=torch.float64)
        A, B, scaling = (f.double() if isinstance(f, Tensor) else f for f in self.factors[layer])
        return scaling * (x.double() @ A.T) @ B.T


def delta(of: AdapterBank, layer: str, slot: int, x: Tensor) -> Tensor:
    """What rows of x (T, K) get from a slot of the bank, by the op that layers call."""
    pages, y = of.pages(layer), x.new_zeros(len(x), SHAPES[layer][0])
    ids = torch.full((len(x),), slot, dtype=torch.int32)
    return F.multi_lora_add_(
        y, x, pages.lora_A, pages.lora_B, ids, pages.scalings,
        ranks=pages.ranks, page_table=pages.table,
    )  # fmt: skip


def wait_until_settled(of: AdapterBank) -> None:
    """Returns when the loader has nothing to do before somebody gives something back."""
    of._loader.wait_for(int)
    while of._queue.is_awake:
        of._loader.wait_for(int)


def assert_lends(of: AdapterBank, names: Mapping[str, Adapter]) -> None:
    """One lease of all the names: in its slots are these adapters' numbers."""
    with of.lease(list(names)).result(60) as lease:
        for slot, adapter in zip(lease.slots, names.values(), strict=True):
            for layer, (_, K) in SHAPES.items():
                x = torch.randn(3, K)
                want = adapter.delta(layer, x)
                off = (delta(of, layer, slot, x).double() - want).norm()
                assert float(off) <= 1e-5 * max(float(want.norm()), 1.0)


def assert_empty(of: AdapterBank) -> None:
    """Nothing on the device nor in the host's memory, and no page that is not zero."""
    stats = of.stats()
    assert (stats.known, stats.resident, stats.copied, stats.leases) == (0, 0, 0, 0)
    assert (stats.device_bytes_used, stats.host_bytes_used) == (0, 0)
    device = of._shelf.device
    assert not any(bool(arena.buffer.any()) for arena in device.arenas.values())
    for tables in device.tables.values():
        assert bool((tables.pages == -1).all())
        assert not bool(tables.ranks.any() | tables.scalings.any())
