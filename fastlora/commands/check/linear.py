"""Cases of one adapter for ``fastlora check``: their data, and the formula's answers to it.

The formula is written out once, in ``compute_answers``, and shares no code with any backend: in
float64 on the CPU it gives the right results, in the dtype on the device it is the yardstick.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlora.backends import dropout
from fastlora.commands.check.judging import (
    DTYPES,
    Product,
    WrongResult,
    choose_product,
    compute_error_ratio,
    fill_empty_with_nan,
    lay_out,
)

SCALING = -1.5


class Case(NamedTuple):
    """Shape of one layer and batch, and what its call has besides."""

    M: int
    K: int
    N: int
    R: int
    dropout: float = 0.0
    biases: bool = False
    layout: str = "plain"
    weight: bool = True  # whether backward has a base weight, which lora_add_'s has not

    def __str__(self) -> str:
        parts = [f"M={self.M} K={self.K} N={self.N} R={self.R}"]
        parts += [f"dropout {self.dropout}"] if self.dropout else []
        parts += ["biases"] if self.biases else []
        parts += [] if self.weight else ["no weight"]
        parts += [self.layout] if self.layout != "plain" else []
        return ", ".join(parts)


_VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    {"dropout": 0.25, "biases": True, "layout": "strided"},
    {"biases": True, "layout": "misaligned"},
    {"dropout": 0.1, "weight": False},
    {"dropout": 0.1},
)
# Odd sizes, one with more ranks than a single tile holds, and few rows of whole tiles.
_SHAPES = (
    (1, 63, 65, 4),
    (63, 431, 129, 16),
    (130, 257, 300, 40),
    (24, 72, 136, 200),
    (8, 512, 256, 16),
)
# Sizes in which every row is aligned: what tensor descriptors need.
_ALIGNED = (256, 512, 384, 64)
# Enough tiles to fill any GPU, and none of them ends where the matrices do.
_LARGE = (2048, 1128, 2312, 48)


def list_cases(quick: bool, gpu: bool) -> list[Case]:
    """Lists every shape plain and in one more variant, an aligned one in all of them."""
    shapes, aligned = (_SHAPES[:1], (17, 64, 40, 8)) if quick else (_SHAPES, _ALIGNED)
    pairs = [(s, _VARIANTS[v]) for i, s in enumerate(shapes) for v in (0, 1 + i % 4)]
    pairs += [(aligned, variant) for variant in _VARIANTS]
    if gpu and not quick:
        pairs += [(_LARGE, _VARIANTS[v]) for v in (0, 2, 4)]
    return [Case(*shape, **variant) for shape, variant in pairs]


def compute_answers(
    t: dict[str, Tensor], case: Case, keep: Tensor | None, product: Product
) -> dict[str, Tensor]:
    """Computes the formula and its gradients, unfused, in the dtype and on the device of t."""
    x, dy, dtype = t["x"], t["dy"], t["x"].dtype
    A, B = t["lora_A"].to(dtype), t["lora_B"].to(dtype)

    def drop(branch: Tensor) -> Tensor:
        return branch if keep is None else branch * keep * dropout.keep_scale(case.dropout)

    h = product(drop(x), A.T)
    base, delta = product(x, t["weight"].T), product(h, B.T)
    if case.biases:
        base, delta = base + t["bias"], delta + t["lora_bias"].to(dtype)
    g = product(dy, B)
    dx = SCALING * drop(product(g, A))
    return {
        "y": base + SCALING * delta,
        "y added to": t["y"] + SCALING * delta,
        "h": h,
        "scaled h": SCALING * h,
        "dx": dx + product(dy, t["weight"]) if case.weight else dx,
        "dweight": product(dy.T, x),
        "dbias": dy.sum(0),
        "dlora_A": SCALING * product(g.T, drop(x)),
        "dlora_B": SCALING * product(dy.T, h),
        "dlora_bias": SCALING * dy.sum(0),
    }


class Subject:
    """One case's data, the right results, and unfused torch's.

    The data is drawn on draw's device: on the CPU the formula is computed in float64, on a GPU,
    where it must be quick, in float32 for half precision.
    """

    def __init__(self, case: Case, name: str, device: torch.device, draw: torch.Generator) -> None:
        M, K, N, R = case[:4]
        self.case, self.name = case, name
        sizes = {
            "x": (1.0, M, K), "weight": (K**-0.5, N, K), "bias": (1.0, N), "y": (1.0, M, N),
            "dy": (1.0, M, N), "lora_A": (K**-0.5, R, K), "lora_B": (R**-0.5, N, R),
            "lora_bias": (1.0, N),
        }  # fmt: skip
        half = DTYPES[name][0] != torch.float32 and draw.device.type != "cpu"
        wide = {"dtype": torch.float32 if half else torch.float64, "device": draw.device}
        self.tensors: dict[str, Tensor] = {}
        for tensor, (size, *shape) in sizes.items():
            values = size * torch.randn(shape, generator=draw, **wide)
            values = values.to(device, DTYPES[name]["lora" in tensor])
            awkward = tensor in ("x", "y", "dy", "weight")
            self.tensors[tensor] = lay_out(values, case.layout if awkward else "plain")
        self.seed = keep = None
        if case.dropout:
            self.seed = torch.randint(-(2**63), 2**63 - 1, (), generator=draw, device=draw.device)
            keep = dropout.keep_mask(M, K, case.dropout, self.seed)
            self.seed = self.seed.to(device)
        exact = {n: t.to(**wide) for n, t in self.tensors.items()}
        self.want = compute_answers(exact, case, keep, torch.matmul)
        keep = None if keep is None else keep.to(device)
        self.unfused = compute_answers(self.tensors, case, keep, choose_product(name))

    def run(self, op: str, function: Callable[..., Any]) -> list[tuple[str, Tensor]]:
        """Runs the op; its results by the names of ``compute_answers``."""
        t, case = self.tensors, self.case
        dropped = (SCALING, case.dropout, self.seed)
        lora_bias = t["lora_bias"] if case.biases else None
        if op == "lora_linear":
            bias = t["bias"] if case.biases else None
            operands = (t["x"], t["weight"], bias, t["lora_A"], t["lora_B"], lora_bias)
            return list(zip(("y", "h"), function(*operands, *dropped), strict=True))
        if op == "lora_add_":
            y, h = lay_out(t["y"], case.layout), torch.full_like(self.unfused["h"], math.nan)
            function(y, h, t["x"], t["lora_A"], t["lora_B"], lora_bias, *dropped)
            return [("y added to", y), ("h", h)]
        names = ("dx", "dweight", "dbias", "dlora_A", "dlora_B", "dlora_bias")
        weight = t["weight"] if case.weight else None
        every, adapters = [True] * 6, [False, False, False, True, True, False]
        results: list[tuple[str, Tensor]] = []
        # All gradients, those that LoRA needs, or those of the first layer, whose x needs none.
        for needs in [every] if case.biases else [[True, *adapters[1:]], adapters]:
            operands = (t["dy"], t["x"], weight, t["lora_A"], t["lora_B"], self.unfused["h"])
            grads = function(*operands, *dropped, needs)
            needed = [name for name, need in zip(names, needs, strict=True) if need]
            results += zip(needed, grads, strict=True)
        return results

    def judge(self, op: str, function: Callable[..., Any]) -> float:
        """Returns the worst error ratio of an op's results; WrongResult where it is above 1."""
        with fill_empty_with_nan():
            results = self.run(op, function)
        worst = 0.0
        for name, got in results:
            dtype = DTYPES[self.name][name.startswith("dlora")]
            if got.dtype != dtype:
                raise WrongResult(f"{name} is of {got.dtype}, expected {dtype}")
            ratio = compute_error_ratio(got, self.want[name], self.unfused[name], self.name)
            if not ratio <= 1:
                raise WrongResult(f"{name} errs by {ratio:.3g} times what is allowed")
            worst = max(worst, ratio)
        for (name, got), (_, again) in zip(results, self.run(op, function), strict=True):
            if not torch.equal(got, again):
                raise WrongResult(f"{name} had other bits the second time")
        return worst
