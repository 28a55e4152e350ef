"""``Layout``: adapters in pages of eight ranks of one layer, A (page, K) and then B (page, N).

A layer reads its pages where they are: its page p begins at granule p of the arena, so that one
table serves A and B, and any granule may be the beginning of any layer's page. The views that it
reads through overlap, therefore; nothing is ever written through them.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from fastlora.serving.bank.arena import GRANULE, Arena, clear, count_granules

# Ranks: what the GPU kernels read at least, and all that an adapter's last page can waste.
PAGE = 8

# Where an arena is and what it holds: layers of one kind share it.
Kind = tuple[torch.device, torch.dtype]


class Factors(NamedTuple):
    """A layer's adapter: lora_A (r, K), lora_B (N, r) on the CPU, and the scaling."""

    lora_A: Tensor
    lora_B: Tensor
    scaling: float


@dataclass(frozen=True)
class Served:
    """A layer (N, K) that adapters are for, and its index among the layers of its arena."""

    N: int
    K: int
    kind: Kind
    index: int

    @property
    def a_granules(self) -> int:
        return count_granules(PAGE * self.K)

    @property
    def page_granules(self) -> int:
        return self.a_granules + count_granules(PAGE * self.N)


@dataclass(frozen=True, eq=False)
class Image:
    """An adapter as a layout's pages hold it, in the host's memory.

    For each arena: flats, page after page. sizes, the pages' granules. tables (layers, pages a
    slot), whose entries count these pages, -1 where there is none. ranks and scalings, one a layer.
    """

    layout: Layout
    flats: dict[Kind, Tensor]
    sizes: dict[Kind, list[int]]
    tables: dict[Kind, Tensor]
    ranks: dict[Kind, Tensor]
    scalings: dict[Kind, Tensor]
    nbytes: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "nbytes", sum(flat.nbytes for flat in self.flats.values()))


class Layout:
    """The layers that are served, and the highest rank that an adapter may have.

    layers: {name: (N, K, device, dtype of the adapters)}.
    """

    def __init__(
        self, layers: Mapping[str, tuple[int, int, torch.device, torch.dtype]], max_rank: int
    ) -> None:
        self.max_rank = max_rank
        self.pages = -(-max_rank // PAGE)
        self.layers: dict[str, Served] = {}
        self.counts: dict[Kind, int] = {}
        for name, (N, K, device, dtype) in layers.items():
            kind = (device, dtype)
            index = self.counts.get(kind, 0)
            self.layers[name] = Served(N, K, kind, index)
            self.counts[kind] = index + 1

    def granules(self, ranks: Mapping[str, int]) -> dict[Kind, int]:
        """Returns how much of each arena an adapter of these ranks takes."""
        total = dict.fromkeys(self.counts, 0)
        for name, r in ranks.items():
            layer = self.layers[name]
            total[layer.kind] += -(-r // PAGE) * layer.page_granules
        return total

    def nbytes(self, ranks: Mapping[str, int]) -> int:
        return sum(n * GRANULE * kind[1].itemsize for kind, n in self.granules(ranks).items())

    def image(self, factors: Mapping[str, Factors]) -> Image:
        """Puts an adapter in pages, pinned where an arena is a GPU's, so that copies overlap."""
        flats, tables, ranks, scalings = {}, {}, {}, {}
        sizes: dict[Kind, list[int]] = {kind: [] for kind in self.counts}
        need = self.granules({name: f.lora_A.shape[0] for name, f in factors.items()})
        for kind, count in self.counts.items():
            pin = kind[0].type == "cuda"
            flats[kind] = torch.empty(
                need[kind] * GRANULE, dtype=kind[1], device="cpu", pin_memory=pin
            )
            clear(flats[kind])
            tables[kind] = torch.full((count, self.pages), -1, dtype=torch.int32, device="cpu")
            ranks[kind] = torch.zeros(count, dtype=torch.int32, device="cpu")
            scalings[kind] = torch.zeros(count, dtype=torch.float32, device="cpu")
        at = dict.fromkeys(self.counts, 0)
        for name, (A, B, scaling) in factors.items():
            layer = self.layers[name]
            kind, r = layer.kind, A.shape[0]
            ranks[kind][layer.index], scalings[kind][layer.index] = r, scaling
            for page, first in enumerate(range(0, r, PAGE)):
                n = min(PAGE, r - first)
                flat = flats[kind][at[kind] * GRANULE :]
                flat[: n * layer.K].view(n, layer.K).copy_(A[first : first + n])
                flat = flat[layer.a_granules * GRANULE :]
                flat[: n * layer.N].view(n, layer.N).copy_(B[:, first : first + n].T)
                tables[kind][layer.index, page] = len(sizes[kind])
                sizes[kind].append(layer.page_granules)
                at[kind] += layer.page_granules
        return Image(self, flats, sizes, tables, ranks, scalings)

    def factors(self, image: Image) -> dict[str, Factors]:
        """Returns what the image was made from, in the arenas' dtypes."""
        starts = {k: [0, *accumulate(s)] for k, s in image.sizes.items()}
        factors = {}
        for name, layer in self.layers.items():
            kind, r = layer.kind, int(image.ranks[layer.kind][layer.index])
            A = torch.empty(r, layer.K, dtype=kind[1], device="cpu")
            B = torch.empty(layer.N, r, dtype=kind[1], device="cpu")
            for page, first in enumerate(range(0, r, PAGE)):
                n = min(PAGE, r - first)
                start = starts[kind][int(image.tables[kind][layer.index, page])]
                flat = image.flats[kind][start * GRANULE :]
                A[first : first + n] = flat[: n * layer.K].view(n, layer.K)
                flat = flat[layer.a_granules * GRANULE :]
                B[:, first : first + n] = flat[: n * layer.N].view(n, layer.N).T
            factors[name] = Factors(A, B, float(image.scalings[kind][layer.index]))
        return {name: f for name, f in factors.items() if f.lora_A.shape[0]}

    def views(self, name: str, arena: Arena) -> tuple[Tensor, Tensor]:
        """Returns all that can be a page of the layer: A (P, page, K) and B (P, page, N)."""
        layer, buffer = self.layers[name], arena.buffer
        P = max(arena.size - layer.page_granules + 1, 0)
        shift = layer.a_granules * GRANULE if P else 0
        return (
            buffer.as_strided((P, PAGE, layer.K), (GRANULE, layer.K, 1), 0),
            buffer.as_strided((P, PAGE, layer.N), (GRANULE, layer.N, 1), shift),
        )


def hash_factors(factors: Mapping[str, Factors]) -> str:
    """Returns the SHA-256 of an adapter's content, whatever its name and place."""
    total = hashlib.sha256()
    for name, (A, B, scaling) in sorted(factors.items()):
        shapes = f"{name} {scaling.hex()} {tuple(A.shape)} {A.dtype} {tuple(B.shape)} {B.dtype}\n"
        total.update(shapes.encode())
        for factor in (A, B):
            total.update(factor.contiguous().view(torch.uint8).numpy().data)
    return total.hexdigest()


def check_factors(factors: Mapping[str, Factors], layout: Layout) -> None:
    """Raises ValueError for a layer, shape, rank or scaling that the layout cannot hold."""
    for name, (A, B, scaling) in factors.items():
        layer = layout.layers.get(name)
        if layer is None:
            raise ValueError(f"{name}: the adapter is for a layer that is not served here")
        r = A.shape[0] if A.dim() == 2 else -1
        if (tuple(A.shape), tuple(B.shape)) != ((r, layer.K), (layer.N, r)):
            raise ValueError(
                f"{name}: expected lora_A (r, {layer.K}) and lora_B ({layer.N}, r), got "
                f"{tuple(A.shape)} and {tuple(B.shape)}"
            )
        if r > layout.max_rank:
            raise ValueError(f"{name}: expected a rank of at most {layout.max_rank}, got {r}")
        if not math.isfinite(scaling) or abs(scaling) > torch.finfo(torch.float32).max:
            raise ValueError(f"{name}: expected a finite scaling that float32 holds, got {scaling}")
        # float16 alone has less range than what adapters are saved in.
        for what, factor in (("lora_A", A), ("lora_B", B)):
            narrow = layer.kind[1] == torch.float16 != factor.dtype
            beyond = factor.abs() > torch.finfo(torch.float16).max if narrow else None
            if beyond is not None and bool((beyond & factor.isfinite()).any()):
                raise ValueError(f"{name}: {what} holds numbers that torch.float16 does not")
