"""What ``fastlora check`` judges by: the formula in float64, and what unfused torch makes of it.

Each result may err by twice what unfused torch errs in the same dtype, plus a slack. The formula is
written out once, in ``answers``, and shares no code with any backend: in float64 on the CPU it says
what is wanted, in the dtype on the device it is the yardstick.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlora.backends import dropout

# (dtype of x and weight, dtype of the adapters), by the names that rows have; tf32 is fp32 as a
# tensor core multiplies it.
DTYPES = {
    "fp32": (torch.float32, torch.float32),
    "tf32": (torch.float32, torch.float32),
    "fp16": (torch.float16, torch.float16),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp16+fp32": (torch.float16, torch.float32),
    "bf16+fp32": (torch.bfloat16, torch.float32),
}
SLACK = {"fp32": 1e-6, "tf32": 1e-6, "fp16": 3e-4, "bf16": 2e-3}
# Rounding errors of a single number, relative to it.
_EPS = {"fp32": 2**-23, "tf32": 2**-10, "fp16": 2**-10, "bf16": 2**-7}
SCALING = -1.5

Product = Callable[[Tensor, Tensor], Tensor]


class WrongResult(Exception):
    """An op ran and what it returned is not right."""


class Case(NamedTuple):
    M: int
    K: int
    N: int
    R: int
    dropout: float = 0.0
    biases: bool = False
    layout: str = "plain"
    weight: bool = True  # whether backward has a base weight, which lora_add_'s has not

    def __str__(self) -> str:
        said = [f"M={self.M} K={self.K} N={self.N} R={self.R}"]
        said += [f"dropout {self.dropout}"] if self.dropout else []
        said += ["biases"] if self.biases else []
        said += [] if self.weight else ["no weight"]
        said += [self.layout] if self.layout != "plain" else []
        return ", ".join(said)


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
# Sizes of which every row is aligned: what tensor descriptors need.
_ALIGNED = (256, 512, 384, 64)
# Enough tiles to fill any GPU, and none of them ends where the matrices do.
_LARGE = (2048, 1128, 2312, 48)


def cases(quick: bool, gpu: bool) -> list[Case]:
    """Every shape plain and in one more variant, an aligned one in all of them."""
    shapes, aligned = (_SHAPES[:1], (17, 64, 40, 8)) if quick else (_SHAPES, _ALIGNED)
    found = [(s, _VARIANTS[v]) for i, s in enumerate(shapes) for v in (0, 1 + i % 4)]
    found += [(aligned, variant) for variant in _VARIANTS]
    if gpu and not quick:
        found += [(_LARGE, _VARIANTS[v]) for v in (0, 2, 4)]
    return [Case(*shape, **variant) for shape, variant in found]


def laid_out(t: Tensor, layout: str) -> Tensor:
    """A copy whose elements lie as awkwardly as an op's caller may have them."""
    if layout == "strided":
        apart = t.new_full((*t.shape[:-1], 2 * t.shape[-1]), math.nan)
        apart[..., ::2] = t
        return apart[..., ::2]
    if layout == "misaligned":
        return t.new_empty(t.numel() + 1)[1:].copy_(t.flatten()).view(t.shape)
    return t.clone(memory_format=torch.contiguous_format)


def answers(
    t: dict[str, Tensor], case: Case, keep: Tensor | None, product: Product
) -> dict[str, Tensor]:
    """The formula and its gradients, unfused, in the dtype and on the device of t."""
    x, dy, dtype = t["x"], t["dy"], t["x"].dtype
    A, B = t["lora_A"].to(dtype), t["lora_B"].to(dtype)

    def dropped(branch: Tensor) -> Tensor:
        return branch if keep is None else branch * keep * dropout.keep_scale(case.dropout)

    h = product(dropped(x), A.T)
    base, delta = product(x, t["weight"].T), product(h, B.T)
    if case.biases:
        base, delta = base + t["bias"], delta + t["lora_bias"].to(dtype)
    g = product(dy, B)
    dx = SCALING * dropped(product(g, A))
    return {
        "y": base + SCALING * delta,
        "y added to": t["y"] + SCALING * delta,
        "h": h,
        "scaled h": SCALING * h,
        "dx": dx + product(dy, t["weight"]) if case.weight else dx,
        "dweight": product(dy.T, x),
        "dbias": dy.sum(0),
        "dlora_A": SCALING * product(g.T, dropped(x)),
        "dlora_B": SCALING * product(dy.T, h),
        "dlora_bias": SCALING * dy.sum(0),
    }


def product_of(name: str) -> Product:
    """How unfused torch multiplies in this dtype.

    tf32 operands as a tensor core reads them: which small products the library takes in full
    float32 is its own choice, and must not decide what passes.
    """
    if name != "tf32":
        return torch.matmul

    def cut(t: Tensor) -> Tensor:
        return (t.contiguous().view(torch.int32) & -(1 << 13)).view(torch.float32)

    return lambda a, b: torch.matmul(cut(a), cut(b))


def error_ratio(got: Tensor, want: Tensor, unfused: Tensor, name: str) -> float:
    """The error of got over the one it may have: more than 1, or NaN, is wrong."""
    name = name.split("+")[0]
    if got.shape != want.shape:
        return math.inf
    norm = want.norm().item() or 1.0

    def error(t: Tensor) -> float:
        return (t.to(want.device, want.dtype) - want).norm().item() / norm

    # Of a few numbers unfused torch may by luck have none wrong.
    luck = _EPS[name] if got.numel() < 64 else 0.0
    return error(got) / (2 * max(error(unfused), luck) + SLACK[name])


class Subject:
    """One case's data, what is wanted of it, and what unfused torch makes of it.

    Drawn on draw's device: on the CPU the formula is taken in float64, on a GPU, where it must be
    quick, in float32 for half precision.
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
            self.tensors[tensor] = laid_out(values, case.layout if awkward else "plain")
        self.seed = keep = None
        if case.dropout:
            self.seed = torch.randint(-(2**63), 2**63 - 1, (), generator=draw, device=draw.device)
            keep = dropout.keep_mask(M, K, case.dropout, self.seed)
            self.seed = self.seed.to(device)
        exact = {n: t.to(**wide) for n, t in self.tensors.items()}
        self.want = answers(exact, case, keep, torch.matmul)
        keep = None if keep is None else keep.to(device)
        self.unfused = answers(self.tensors, case, keep, product_of(name))

    def run(self, op: str, function: Callable[..., Any]) -> list[tuple[str, Tensor]]:
        """What the op makes of it, by the names of ``answers``."""
        t, case = self.tensors, self.case
        dropped = (SCALING, case.dropout, self.seed)
        lora_bias = t["lora_bias"] if case.biases else None
        if op == "lora_linear":
            bias = t["bias"] if case.biases else None
            operands = (t["x"], t["weight"], bias, t["lora_A"], t["lora_B"], lora_bias)
            return list(zip(("y", "h"), function(*operands, *dropped), strict=True))
        if op == "lora_add_":
            y, h = laid_out(t["y"], case.layout), torch.full_like(self.unfused["h"], math.nan)
            function(y, h, t["x"], t["lora_A"], t["lora_B"], lora_bias, *dropped)
            return [("y added to", y), ("h", h)]
        names = ("dx", "dweight", "dbias", "dlora_A", "dlora_B", "dlora_bias")
        weight = t["weight"] if case.weight else None
        every, adapters = [True] * 6, [False, False, False, True, True, False]
        found: list[tuple[str, Tensor]] = []
        # All gradients, those that LoRA needs, or those of the first layer, whose x needs none.
        for needs in [every] if case.biases else [[True, *adapters[1:]], adapters]:
            operands = (t["dy"], t["x"], weight, t["lora_A"], t["lora_B"], self.unfused["h"])
            grads = function(*operands, *dropped, needs)
            asked = [name for name, need in zip(names, needs, strict=True) if need]
            found += zip(asked, grads, strict=True)
        return found

    def verdict(self, op: str, function: Callable[..., Any]) -> float:
        """The worst error ratio of an op's results; raises WrongResult where it is above 1."""
        with empty_is_nan():
            results = self.run(op, function)
        worst = 0.0
        for name, got in results:
            dtype = DTYPES[self.name][name.startswith("dlora")]
            if got.dtype != dtype:
                raise WrongResult(f"{name} is of {got.dtype}, expected {dtype}")
            ratio = error_ratio(got, self.want[name], self.unfused[name], self.name)
            if not ratio <= 1:
                raise WrongResult(f"{name} errs by {ratio:.3g} times what is allowed")
            worst = max(worst, ratio)
        for (name, got), (_, again) in zip(results, self.run(op, function), strict=True):
            if not torch.equal(got, again):
                raise WrongResult(f"{name} had other bits the second time")
        return worst


@contextmanager
def empty_is_nan() -> Iterator[None]:
    """What an op allocates and does not write shows: torch fills it in its deterministic mode."""
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
