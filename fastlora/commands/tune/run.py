"""``fastlora tune``: times every config that ships, on drawn data, and keeps the fastest.

A layer's shape M,K,N,R is two products, x (M, K) by (K, N) forward and dy (M, N) by (N, K)
backward; each kernel is timed for both, and then each op along every path with the configs that
won. What is wrong is never timed. Rows go to ``<gpu>.json``, which ``kernels/choose/choice.py``
reads: ``base_us`` is what torch takes for the product alone, of ``gradient`` for ``h.T @ x``, of
``shrink`` for ``x @ a.T``, of ``expand`` for ``h @ b``. ``shrink_beside`` is timed with the product
that it runs beside.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fastlora.commands.check.judging import DTYPES, WrongResult, compute_error_ratio
from fastlora.commands.check.linear import Case, Subject
from fastlora.commands.check.run import set_fp32_precision
from fastlora.commands.check.stamps import find_commit, is_lost
from fastlora.commands.progress import Progress
from fastlora.commands.tune.calls import (
    KERNELS,
    KernelCall,
    Shape,
    make_kernel_calls,
    make_op_calls,
)

KEYS = ("kernel", "dtype", "M", "K", "N", "R", "triton")
# Returns a call's time in µs.
Clock = Callable[[Callable[[], object]], float]

_LAYERS = ((4096, 4096), (4096, 14336), (14336, 4096))
SHAPES: tuple[Shape, ...] = tuple(
    (M, K, N, R) for M in (1, 16, 64, 256, 2048, 8192) for K, N in _LAYERS for R in (16, 64)
)
QUICK: tuple[Shape, ...] = tuple((M, 1024, 1024, 16) for M in (1, 256, 2048))
# A candidate that takes this many times the best's time in the first round is not timed again.
_HOPELESS = 1.5


def time_call(call: Callable[[], object]) -> float:
    """Returns the median µs of a call, the L2 cache flushed before each."""
    from triton import testing

    milliseconds: Any = testing.do_bench(call, warmup=5, rep=30, quantiles=[0.5])
    return 1e3 * milliseconds


class Tuner:
    """Timer of one device in one dtype, which writes rows as it goes."""

    def __init__(
        self, device: torch.device, dtype: str, clock: Clock, folder: Path | None, rounds: int,
        say: Callable[[str], None],
    ) -> None:  # fmt: skip
        self.device, self.dtype, self.clock, self.rounds = device, dtype, clock, rounds
        self.folder, self.say, self.wrong = folder, say, 0
        from fastlora.commands.kernels import choice

        self._gpu = choice.gpu_name(device)
        self._stamp = {"gpu": self._gpu, **choice.versions(), "commit": find_commit()}
        self._timed: dict[tuple[object, ...], dict[str, Any]] = {}

    def draw_subject(self, shape: Shape) -> Subject:
        """Draws a layer's data, other numbers each time."""
        draw = torch.Generator(self.device)
        draw.seed()
        return Subject(Case(*shape), self.dtype, self.device, draw)

    def tune_kernels(self, shape: Shape, names: Sequence[str]) -> None:
        """Finds the fastest config of each kernel for the product, and writes the rows."""
        subject = self.draw_subject(shape)
        with self._reading_from_folder():
            for kernel, call in make_kernel_calls(subject, self.device).items():
                if kernel not in names:
                    continue
                key = (kernel, *call.decides)
                if key not in self._timed:
                    self._timed[key] = self._find_fastest_config(kernel, call, subject)
                if self._timed[key]:
                    self._write([self._make_row(kernel, call.key) | self._timed[key]])

    def tune_paths(self, shape: Shape) -> None:
        """Finds the fastest path of each op of the layer, with the configs that were written."""
        from fastlora.commands.kernels import choice, launch, ledger, linear_ops

        arch = launch.arch_of(self.device)
        subject, rows = self.draw_subject(shape), []
        first = subject.tensors["x"].dtype == torch.float16
        size = subject.tensors["x"].itemsize
        with self._reading_from_folder():
            for name, op in make_op_calls(subject).items():
                problem = ledger.Problem(*op.key, size, op.weight)
                paths = [p for p in ledger.PATHS if choice.possible(p, problem, arch, first)]

                def check(path: str, name: str = name) -> None:
                    subject.judge(name, partial(getattr(linear_ops, name), path=path))

                best = self._find_fastest(
                    f"path of {name}", paths, check,
                    lambda path, op=op: partial(op.call, path=path), op.base,
                )  # fmt: skip
                if best is not None:
                    times = dict(zip(("path", "us", "base_us"), best, strict=True))
                    row = self._make_row(f"path of {name}", op.key)
                    rows.append(row | times | {"weight": op.weight})
        self._write(rows)

    def _find_fastest_config(
        self, kernel: str, call: KernelCall, subject: Subject
    ) -> dict[str, Any]:
        """Returns a kernel's fastest config as a row has it; empty where no candidate runs."""
        from fastlora.commands.kernels import choice, configs, fitting, launch, ledger

        size, lora_size = (dtype.itemsize for dtype in DTYPES[self.dtype])
        problem = ledger.Problem(*call.key, size, lora_size=lora_size)
        need = choice.need(kernel, problem, self.dtype, launch.arch_of(self.device))
        # Timed as they are launched, written as they ship: each call fits them to its own needs.
        shipped = configs.CANDIDATES[kernel]
        fitted = {fitting.fitted(config, need): config for config in reversed(shipped)}

        def check(config: object) -> None:
            for result, start in call.results.values():
                result.fill_(torch.nan) if start is None else result.copy_(start)
            call.launch(config=config)
            for name, (got, _) in call.results.items():
                ratio = compute_error_ratio(
                    got, subject.want[name], subject.unfused[name], self.dtype
                )
                if not ratio <= 1:
                    raise WrongResult(f"{name} errs by {ratio:.3g} times what is allowed")

        best = self._find_fastest(
            kernel, list(reversed(fitted)), check, lambda c: partial(call.launch, config=c),
            call.base,
        )  # fmt: skip
        if best is None:
            return {}
        return {"config": dict(vars(fitted[best[0]])), "us": best[1], "base_us": best[2]}

    def _find_fastest(
        self, name: str, candidates: list[Any], check: Callable[[Any], None],
        make_call: Callable[[Any], Callable[[], object]], base: Callable[[], object],
    ) -> tuple[Any, float, float] | None:  # fmt: skip
        """Returns the fastest candidate that passes its check, its µs and the base's."""
        racing = [c for c in candidates if self._passes(name, c, check)]
        times: dict[Any, list[float]] = {candidate: [] for candidate in racing}
        bases: list[float] = []
        # In rounds, so that a clock that falls with heat falls for all of them.
        for _ in range(self.rounds):
            bases.append(self.clock(base))
            for candidate in racing:
                times[candidate].append(self.clock(make_call(candidate)))
            medians = {candidate: statistics.median(times[candidate]) for candidate in racing}
            limit = _HOPELESS * min(medians.values(), default=0.0)
            racing = [candidate for candidate in racing if medians[candidate] <= limit]
        if not racing:
            return None
        best = min(racing, key=lambda candidate: statistics.median(times[candidate]))
        us = statistics.median(times[best])
        return best, round(us, 2), round(statistics.median(bases), 2)

    def _passes(self, name: str, candidate: Any, check: Callable[[Any], None]) -> bool:
        """Whether the candidate runs here and is right; says so if not."""
        try:
            check(candidate)
        except WrongResult as error:
            self.wrong += 1
            self.say(f"WRONG {name} {candidate}: {error}")
            return False
        except Exception as error:  # too many resources, or what the compiler does not take
            if is_lost(self.device):
                raise
            reason = (str(error).strip() or "no reason given").splitlines()[0]
            self.say(f"skipped {name} {candidate}: {type(error).__name__}: {reason}")
            return False
        return True

    def _make_row(self, kernel: str, key: Shape) -> dict[str, Any]:
        return {
            "kernel": kernel, "dtype": self.dtype, **dict(zip("MKNR", key, strict=True)),
            **self._stamp,
        }  # fmt: skip

    def _write(self, rows: list[dict[str, Any]]) -> None:
        from fastlora.commands.kernels import choice, records

        if rows:
            records.write(records.file_of(self._gpu), rows, KEYS, self.folder)
        choice.forget()

    @contextmanager
    def _reading_from_folder(self) -> Iterator[None]:
        """Makes kernels read their configs from the folder that rows are written to."""
        from fastlora.commands.kernels import choice

        before = os.environ.get("FASTLORA_CACHE")
        if self.folder is not None:
            os.environ["FASTLORA_CACHE"] = str(self.folder)
        choice.forget()
        try:
            yield
        finally:
            if before is None:
                os.environ.pop("FASTLORA_CACHE", None)
            else:
                os.environ["FASTLORA_CACHE"] = before
            choice.forget()


def tune(
    device: torch.device,
    shapes: Sequence[Shape] = SHAPES,
    *,
    dtypes: Sequence[str] = ("bf16",),
    kernels: Sequence[str] | None = None,
    folder: Path | None = None,
    rounds: int = 3,
    clock: Clock = time_call,
) -> bool:
    """Tunes the kernels, and the paths unless kernels are named; returns whether all were right."""
    steps, wrong = len(shapes) * len(dtypes), 0
    with Progress("fastlora tune", steps) as progress:
        for dtype in dtypes:
            with set_fp32_precision(dtype):
                tuner = Tuner(device, dtype, clock, folder, rounds, progress.say)
                tuned: set[Shape] = set()
                for shape in shapes:
                    M, K, N, R = shape
                    progress.step(f"{dtype} M={M} K={K} N={N} R={R}")
                    for product in dict.fromkeys((shape, (M, N, K, R))):
                        if product not in tuned:
                            tuner.tune_kernels(product, kernels or KERNELS)
                            tuned.add(product)
                    if kernels is None:
                        tuner.tune_paths(shape)
            wrong += tuner.wrong
    return wrong == 0
