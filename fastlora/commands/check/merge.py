"""Cases of merging for ``fastlora check``: the float64 sum rounded once, and every bit back."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlora.backends.dtypes import BITS
from fastlora.backends.merge_lists import errors
from fastlora.backends.merge_lists.operands import flatten_receipts
from fastlora.commands.check.judging import DTYPES, WrongResult, lay_out

Functions = Mapping[str, Callable[..., Any]]


class MergeCase(NamedTuple):
    """Weights (N, K) of every layout in one call, with adapters of ranks R and 3."""

    N: int
    K: int
    R: int
    ratio: float  # |d| / |W|
    layouts: tuple[str, ...] = ("plain", "strided", "misaligned")

    def __str__(self) -> str:
        return f"N={self.N} K={self.K} R={self.R}, |d|/|W| {self.ratio:g}"


# Less than a tile and several tiles, with few ranks and more than one step of a product.
_CASES = (
    MergeCase(1, 1, 1, 0.1),
    MergeCase(65, 431, 4, 1.0),
    MergeCase(300, 129, 40, 0.01),
    MergeCase(256, 512, 16, 0.001),
)
_LARGE = MergeCase(2312, 1128, 48, 0.05)


def list_merge_cases(quick: bool, gpu: bool) -> list[MergeCase]:
    if quick:
        return [MergeCase(20, 72, 6, 0.1)]
    return [*_CASES, _LARGE] if gpu else list(_CASES)


class MergeSubject:
    """One case's weights, infinities, NaN and subnormals among them, and their adapters."""

    def __init__(
        self, case: MergeCase, name: str, device: torch.device, draw: torch.Generator
    ) -> None:
        self.case, self.device = case, device
        dtype, lora = DTYPES[name]

        def random(*shape: int, dtype: torch.dtype, size: float = 1.0) -> Tensor:
            return (size * torch.randn(shape, generator=draw)).to(device, dtype)

        N, K, size = case.N, case.K, case.K**-0.5
        special = torch.tensor([0.0, -0.0, torch.finfo(dtype).tiny / 4, math.inf, math.nan])
        self.weights, self.adapters = [], []
        for layout in case.layouts:
            weight = random(N, K, dtype=dtype, size=size)
            weight.view(-1)[: min(5, N * K)] = special[: N * K].to(device, dtype)
            self.weights.append(lay_out(weight, layout))
            self.adapters.append(
                [
                    (
                        random(R, K, dtype=lora),
                        random(N, R, dtype=lora),
                        -case.ratio * size / math.sqrt(2 * R),
                    )
                    for R in (case.R, 3)
                ]
            )

    def judge(self, op: str, functions: Functions) -> float:
        """Returns the largest error over the one allowed; WrongResult above 1 or for other bits.

        functions: merge_, unmerge_ and swap_ of one backend.
        """
        before = [_bits(w) for w in self.weights]
        weights = [w.clone() for w in self.weights]
        flat = _flatten(self.adapters)
        receipts = flatten_receipts(functions["merge_"](weights, *flat, True))
        merged = [w.clone() for w in weights]
        if op == "merge_":
            functions["merge_"](again := [w.clone() for w in self.weights], *flat, False)
            _expect_bits(again, [_bits(w) for w in merged], "a merge for good has other bits")
            return self._judge_rounding(merged)
        if op == "unmerge_":
            weights[-1].view(-1)[-1] = 1.5
            _expect_refusal(functions["unmerge_"], weights, *flat, receipts)
            merged[-1].view(-1)[-1] = 1.5
            _expect_bits(weights, [_bits(w) for w in merged], "a refused unmerge changed a weight")
            weights = [w.clone() for w in self.weights]
            functions["merge_"](weights, *flat, False)
            functions["unmerge_"](weights, *flat, receipts)
            _expect_bits(weights, before, "not every bit came back")
            return 0.0
        others = _flatten([[(A, B, -s) for A, B, s in some[:1]] for some in self.adapters])
        made = functions["swap_"](weights, *flat, receipts, *others)
        functions["merge_"](wanted := [w.clone() for w in self.weights], *others, False)
        _expect_bits(weights, [_bits(w) for w in wanted], "a swap is not an unmerge and a merge")
        functions["unmerge_"](weights, *others, flatten_receipts(made))
        _expect_bits(weights, before, "not every bit came back")
        return 0.0

    def _judge_rounding(self, merged: Sequence[Tensor]) -> float:
        """Compares errors with half a unit in the last place and what float32 sums may err."""
        worst = 0.0
        for before, after, adapters in zip(self.weights, merged, self.adapters, strict=True):
            want, size = before.double(), before.double().abs()
            for A, B, scaling in adapters:
                want = want + scaling * (B.double() @ A.double())
                size = size + abs(scaling) * (B.double().abs() @ A.double().abs())
            info, terms = torch.finfo(before.dtype), sum(A.shape[0] for A, _, _ in adapters) + 2
            half = info.eps / 2 * want.abs() + info.smallest_normal * info.eps / 2
            allowed = half * (1 + 1e-6) + terms * 2**-23 * size
            finite = before.isfinite()
            if not bool((after.isfinite() == finite).all()):
                raise WrongResult("values that are not finite, or were not, in other places")
            error = ((after.double() - want).abs() / allowed)[finite]
            worst = max(worst, error.max().item() if error.numel() else 0.0)
        if not worst <= 1:
            raise WrongResult(f"{worst:.2f} times the error of one rounding")
        return worst


def _flatten(adapters: Sequence[Sequence[tuple[Tensor, Tensor, float]]]) -> tuple[list, ...]:
    flat = [adapter for some in adapters for adapter in some]
    return (*([a[i] for a in flat] for i in range(3)), [len(some) for some in adapters])


def _bits(weight: Tensor) -> Tensor:
    return weight.contiguous().view(BITS[weight.itemsize])


def _expect_bits(weights: Sequence[Tensor], bits: Sequence[Tensor], otherwise: str) -> None:
    if not all(torch.equal(_bits(w), b) for w, b in zip(weights, bits, strict=True)):
        raise WrongResult(otherwise)


def _expect_refusal(unmerge: Callable[..., Any], *args: Any) -> None:
    try:
        unmerge(*args)
    except RuntimeError as error:
        if errors.index_of(error) is not None:
            return
        raise
    raise WrongResult("an edited weight was unmerged")
