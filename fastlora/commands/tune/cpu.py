"""``fastlora tune`` on a CPU: up to how many rows the one native call is the fastest form.

For each op and dtype rows are doubled until the native call has lost to the base product with the
adapter's part added; the last number that won is written. Square layers of rank 16, operands
rotating past the caches, forms taking turns, medians. A form whose result differs is never kept.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastlora.backends import native
from fastlora.backends.cpu import choices
from fastlora.backends.cpu.choices import Choice
from fastlora.commands.check.stamps import cache_folder, find_commit
from fastlora.functional import RowGroups, group_rows, lora_linear, multi_lora_linear
from fastlora.kernels.choose import records  # pyright: ignore[reportMissingImports]
from fastlora.ops.dispatch import use_backend

OPS = ("lora_linear", "multi_lora_linear")
DTYPES = {name: dtype for dtype, name in choices.DTYPES.items()}
SIZES, QUICK_SIZES = (1024, 2048), (256,)
ROWS = tuple(2**i for i in range(13))
_RANK, _SLOTS, _COPIES_BYTES = 16, 8, 64 << 20
# What two roundings, in another order of sums, may differ by, of the whole result's size.
_DIFFERENCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
# A ratio up to here may be a draw: the next number of rows is tried.
_LOST = 1.03
# Seconds of a call.
Clock = Callable[[Callable[[], Tensor]], float]


def time_call(call: Callable[[], Tensor]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


class Layer:
    """A square layer with adapters, drawn anew; its weights take turns, so that none is cached."""

    def __init__(self, size: int, dtype: torch.dtype) -> None:
        self.size, self.dtype = size, dtype
        copies = max(2, _COPIES_BYTES // (size * size * dtype.itemsize))
        self._weights = cycle([self._draw(size, size) / size**0.5 for _ in range(copies)])
        self._A = self._draw(_SLOTS, _RANK, size) / size**0.5
        self._B = self._draw(_SLOTS, size, _RANK)
        self._scalings = torch.full((_SLOTS,), 0.5)

    def _draw(self, *shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float32).to(self.dtype)

    def make_call(self, op: str, M: int) -> Callable[[], Tensor]:
        x = self._draw(M, self.size)
        if op == "lora_linear":
            return lambda: lora_linear(x, next(self._weights), self._A[0], self._B[0], 0.5)
        groups: RowGroups = group_rows(torch.arange(M) % _SLOTS, _SLOTS)
        return lambda: multi_lora_linear(
            x, next(self._weights), self._A, self._B, groups, self._scalings
        )

    def agrees(self, op: str, M: int, forms: Sequence[Choice]) -> bool:
        """Whether the forms give the same numbers but for rounding."""
        call, weight = self.make_call(op, M), next(self._weights)
        saved, self._weights = self._weights, cycle([weight])
        results = []
        for form in forms:
            with force(form):
                results.append(call().double())
        self._weights = saved
        bound = _DIFFERENCE[self.dtype] * results[0].norm()
        return all(bool((result - results[0]).norm() <= bound) for result in results)


@contextmanager
def force(choice: Choice) -> Iterator[None]:
    """Every call of the process takes this form, whatever was measured."""
    before, choices.forced = choices.forced, choice
    try:
        yield
    finally:
        choices.forced = before


def find_row(op: str, layers: Sequence[Layer], clock: Clock, rounds: int) -> dict[str, Any]:
    """Returns the columns ``rows`` and ``native``, and the ratios that they follow from."""
    one_call, split, wide = Choice(max(ROWS)), Choice(0), Choice(0, native=True)
    best, ratios, native_ratio = 0, {}, 1.0
    for M in ROWS:
        if not all(layer.agrees(op, M, (split, one_call, wide)) for layer in layers):
            raise RuntimeError(f"{op} of {M} rows: the native product and torch's differ")
        times = [_race(layer.make_call(op, M), (one_call, split, wide), clock, rounds)
                 for layer in layers]  # fmt: skip
        ratio = statistics.geometric_mean([one / two for one, two, _ in times])
        native_ratio = statistics.geometric_mean([three / two for _, two, three in times])
        ratios[M] = round(ratio, 3)
        if ratio > _LOST:
            break
        best = M if ratio <= 1 else best
    return {"rows": best, "native": native_ratio < 0.95, "ratios": ratios}


def _race(
    call: Callable[[], Tensor], forms: Sequence[Choice], clock: Clock, rounds: int
) -> list[float]:
    times: list[list[float]] = [[] for _ in forms]
    for _ in range(rounds + 1):  # the first is not counted
        for form, own in zip(forms, times, strict=True):
            with force(form):
                own.append(clock(call))
    return [statistics.median(own[1:]) for own in times]


def tune_cpu(
    dtypes: Sequence[str], threads: Sequence[int], folder: Path | None, *, quick: bool = False,
    clock: Clock = time_call, say: Callable[[str], None] = print,
) -> None:  # fmt: skip
    """Times every op in the dtypes with each number of threads, and writes the rows."""
    stamp = {
        "isa": native.instruction_set(), "cpu": choices.cpu_name(), **choices.versions(),
        "torch": torch.__version__, "commit": find_commit(),
    }  # fmt: skip
    before = torch.get_num_threads()
    try:
        for count in threads:
            torch.set_num_threads(count)
            for name in dtypes:
                layers = [Layer(n, DTYPES[name]) for n in (QUICK_SIZES if quick else SIZES)]
                for op in OPS:
                    with torch.no_grad(), use_backend("cpu"):
                        found = find_row(op, layers, clock, 3 if quick else 9)
                    row = {"op": op, "dtype": name, "threads": count, **stamp, **found}
                    records.write(choices.FILE, [row], choices.KEYS, folder)
                    beyond = "native" if found["native"] else "torch's"
                    say(
                        f"{op:<18} {name} {count} threads: one call up to {found['rows']} rows, "
                        f"beyond them the product is {beyond}"
                    )
        say(f"rows written to {folder or cache_folder()}; new processes read them")
    finally:
        torch.set_num_threads(before)
        choices.forget()
