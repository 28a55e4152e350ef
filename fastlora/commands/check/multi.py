"""Cases of many adapters for ``fastlora check``: their data, and the formula's answers to it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlora.backends.torch.multi import group_rows
from fastlora.backends.values import Adapters, Rows
from fastlora.commands.check.judging import DTYPES, Product, choose_product, lay_out
from fastlora.commands.check.linear import Subject


class MultiCase(NamedTuple):
    """Shape of one layer and batch with S adapters, and what its call has besides."""

    M: int
    K: int
    N: int
    R: int
    S: int
    optional: bool = False  # bias, ranks and row scales
    layout: str = "plain"
    slices: int = 1  # of a packed projection
    page: int = 0  # ranks a page, where adapters lie in pages
    weight: bool = True

    def __str__(self) -> str:
        parts = [f"T={self.M} K={self.K} N={self.N} R={self.R} S={self.S}"]
        parts += ["bias, ranks, row scales"] if self.optional else []
        parts += [f"{self.slices} slices"] if self.slices > 1 else []
        parts += [f"pages of {self.page}"] if self.page else []
        parts += [] if self.weight else ["no weight"]
        parts += [self.layout] if self.layout != "plain" else []
        return ", ".join(parts)


_PACKED = {"optional": True, "slices": 3, "page": 4}


def list_multi_cases(quick: bool, gpu: bool) -> list[MultiCase]:
    """Lists rows of one adapter and of many, few tiles and many, one part of K and more."""
    if quick:
        return [MultiCase(9, 40, 24, 5, 3, optional=True), MultiCase(9, 40, 24, 5, 3, **_PACKED)]
    cases = [
        MultiCase(1, 63, 65, 4, 3),
        MultiCase(24, 1100, 136, 40, 6, optional=True),
        MultiCase(24, 72, 136, 40, 6, layout="strided", weight=False),
        MultiCase(33, 64, 129, 8, 40, optional=True, layout="misaligned"),
        MultiCase(130, 256, 384, 24, 4),
        MultiCase(130, 256, 384, 24, 4, **_PACKED),
        MultiCase(17, 72, 100, 12, 5, **_PACKED),
        # Few rows, each of whole chunks of 16 bytes.
        MultiCase(40, 264, 136, 24, 6, optional=True),
        MultiCase(17, 72, 104, 16, 5, optional=True, slices=3, page=8),
    ]
    if gpu:
        cases += [
            MultiCase(2048, 1128, 2312, 48, 8, optional=True),
            MultiCase(2048, 1024, 2304, 64, 128, optional=True),
            MultiCase(200, 4096, 1536, 16, 64, **_PACKED),
            MultiCase(64, 4096, 4096, 64, 32, optional=True),
        ]
    return cases


class MultiSubject(Subject):
    """One case's data, as in ``Subject``. What lies past a slot's rank is NaN."""

    def __init__(
        self, case: MultiCase, name: str, device: torch.device, draw: torch.Generator
    ) -> None:
        T, K, N, R, S = case[:5]
        self.case, self.name = case, name
        half = DTYPES[name][0] != torch.float32 and draw.device.type != "cpu"
        wide = {"dtype": torch.float32 if half else torch.float64, "device": draw.device}

        def random(*shape: int, size: float = 1.0) -> Tensor:
            return size * torch.randn(shape, generator=draw, **wide)

        values = {
            "x": random(T, K), "weight": random(N, K, size=K**-0.5), "bias": random(N),
            "y": random(T, N), "dy": random(T, N),
            "lora_A": random(S, case.slices * R, K, size=K**-0.5),
            "lora_B": random(S, N, R, size=R**-0.5),
        }  # fmt: skip
        awkward = ("x", "y", "dy", "weight")
        self.tensors = {
            n: lay_out(
                t.to(device, DTYPES[name]["lora" in n]), case.layout if n in awkward else "plain"
            )
            for n, t in values.items()
        }

        def integers(low: int, high: int, count: int) -> Tensor:
            return torch.randint(low, high, (count,), generator=draw, device=draw.device)

        self.ids = integers(-1, S, T).to(device)
        self.scalings = (1 + random(S).abs()).to(device, torch.float32)
        self.ranks = self.row_scales = None
        if case.optional:
            self.ranks = integers(1, R + 1, S).to(device)
            self.row_scales = random(T).to(device, torch.float32)
            past = torch.arange(R, device=device) >= self.ranks[:, None]
            self.tensors["lora_A"].masked_fill_(past.repeat(1, case.slices)[:, :, None], math.nan)
            self.tensors["lora_B"].masked_fill_(past[:, None], math.nan)
        exact = {n: t.to(**wide) for n, t in self.tensors.items()}
        self.want = self._compute_answers(exact, torch.matmul)
        self.unfused = self._compute_answers(self.tensors, choose_product(name))

    @property
    def ends(self) -> tuple[int, ...]:
        """Ends of slices of unequal widths."""
        N, slices = self.case.N, self.case.slices
        return (N,) if slices == 1 else (N // 2, N // 2 + N // 4, N)

    def _compute_answers(self, t: dict[str, Tensor], product: Product) -> dict[str, Tensor]:
        """Computes the formula and its gradients, a slot and a slice after the other."""
        x, dy, dtype, R = t["x"], t["dy"], t["x"].dtype, self.case.R
        delta, h = torch.zeros_like(t["y"]), x.new_zeros(len(x), self.case.slices * R)
        dx = torch.zeros_like(x)
        grads = {n: torch.zeros_like(t[n]) for n in ("lora_A", "lora_B")}
        ids, ranks = self.ids.to(x.device), [R] * self.case.S
        if self.ranks is not None:
            ranks = self.ranks.tolist()
        for slot, (r, scaling) in enumerate(zip(ranks, self.scalings.tolist(), strict=True)):
            rows, begin = (ids == slot).nonzero().flatten(), 0
            factor = torch.full((len(rows), 1), scaling, dtype=dtype, device=x.device)
            if self.row_scales is not None:
                factor = factor * self.row_scales.to(x.device)[rows, None].to(dtype)
            for i, end in enumerate(self.ends):
                columns, h_columns = slice(begin, end), slice(i * R, i * R + r)
                A, B = (
                    t["lora_A"][slot, h_columns].to(dtype),
                    t["lora_B"][slot, columns, :r].to(dtype),
                )
                h_rows, up = product(x[rows], A.T), dy[rows, columns]
                h[rows, h_columns] = h_rows
                delta[rows, columns] = factor * product(h_rows, B.T)
                g = product(up, B)
                dx[rows] += factor * product(g, A)
                grads["lora_A"][slot, h_columns] = product((factor * g).T, x[rows]).to(A.dtype)
                grads["lora_B"][slot, columns, :r] = product(up.T, factor * h_rows)
                begin = end
        base = product(x, t["weight"].T)
        if self.case.optional:
            base = base + t["bias"]
        return {
            "y": base + delta,
            "y added to": t["y"] + delta,
            "h": h,
            "dx": dx + product(dy, t["weight"]) if self.case.weight else dx,
            "dweight": product(dy.T, x),
            "dbias": dy.sum(0),
            "dlora_A": grads["lora_A"],
            "dlora_B": grads["lora_B"],
        }

    def run(self, op: str, function: Callable[..., Any]) -> list[tuple[str, Tensor]]:
        t, case = self.tensors, self.case
        groups = group_rows(self.ids, case.S)
        rows = Rows(*groups, self.scalings, self.ranks, self.row_scales)
        bias = t["bias"] if case.optional else None
        adapters = Adapters(t["lora_A"], t["lora_B"])
        if op.startswith("packed"):
            packed = Adapters(*self._lay_in_pages(), self.ends)
            if op == "packed_lora_linear":
                return [("y", function(t["x"], t["weight"], bias, packed, rows))]
            y = lay_out(t["y"], case.layout)
            function(y, t["x"], packed, rows)
            return [("y added to", y)]
        if op == "multi_lora_linear":
            results = function(t["x"], t["weight"], bias, adapters, rows)
            return list(zip(("y", "h"), results, strict=True))
        if op == "multi_lora_add_":
            y, h = lay_out(t["y"], case.layout), torch.full_like(self.unfused["h"], math.nan)
            function(y, h, t["x"], adapters, rows)
            return [("y added to", y), ("h", h)]
        names = ("dx", "dweight", "dbias", "dlora_A", "dlora_B")
        weight = t["weight"] if case.weight else None
        operands = (t["dy"], t["x"], weight, adapters, self.unfused["h"], rows)
        return list(zip(names, function(*operands, [True] * 5), strict=True))

    def _lay_in_pages(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Returns lora_A, lora_B and a table as packed ops take them: pages scattered among NaN."""
        A, B, case = self.tensors["lora_A"], self.tensors["lora_B"], self.case
        if not case.page:
            return A, B, None
        S, pages = case.S, -(-case.R // case.page)
        short = (0, 0, 0, pages * case.page - case.R)
        # [S, C, pages, page, K] and [S, pages, page, N]
        wide_A = torch.nn.functional.pad(A.unflatten(1, (case.slices, case.R)), short)
        wide_A = wide_A.unflatten(2, (pages, case.page)).transpose(1, 2).flatten(2, 3)
        wide_B = torch.nn.functional.pad(B.mT, short).unflatten(1, (pages, case.page))
        table = 2 * torch.arange(S * pages - 1, -1, -1, device=A.device).view(S, pages)
        pages_A = A.new_full((2 * S * pages, *wide_A.shape[2:]), math.nan)
        pages_B = B.new_full((2 * S * pages, *wide_B.shape[2:]), math.nan)
        pages_A[table], pages_B[table] = wide_A, wide_B
        if self.ranks is not None:
            used = torch.arange(pages, device=A.device) * case.page < self.ranks[:, None]
            table = table.where(used, -1)
        return pages_A, pages_B.mT, table.to(torch.int32)
