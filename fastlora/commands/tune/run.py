"""``fastlora tune``: times every config that ships, on data of its own, and keeps the fastest.

A layer's shape M,K,N,R is two products, x (M, K) by (K, N) forward and dy (M, N) by (N, K)
backward; each kernel is timed for both, and then each op along every path with the configs that
won. What is wrong is never timed. Rows go to ``<gpu>.json``, which ``kernels/choose/choice.py``
reads: ``base_us`` is what torch takes for the product alone, of ``gradient`` for ``h.T @ x``, of
``shrink`` for ``x @ a.T``, of ``expand`` for ``h @ b``. ``shrink_beside`` is timed with the product
that it runs beside.
"""

from __future__ import annotations

import importlib
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fastlora.commands.check.linear import DTYPES, Case, Subject, WrongResult, error_ratio
from fastlora.commands.check.run import fp32_precision
from fastlora.commands.check.stamps import commit, poisoned
from fastlora.commands.progress import Progress
from fastlora.commands.tune.jobs import KERNELS, Job, Shape, jobs, layer_ops

KEYS = ("kernel", "dtype", "M", "K", "N", "R", "triton")
# What a call takes, in µs.
Clock = Callable[[Callable[[], object]], float]

_LAYERS = ((4096, 4096), (4096, 14336), (14336, 4096))
SHAPES: tuple[Shape, ...] = tuple(
    (M, K, N, R) for M in (1, 16, 64, 256, 2048, 8192) for K, N in _LAYERS for R in (16, 64)
)
QUICK: tuple[Shape, ...] = tuple((M, 1024, 1024, 16) for M in (1, 256, 2048))
# A candidate that takes this many times the best's time in the first round is not timed again.
_HOPELESS = 1.5


def do_bench(call: Callable[[], object]) -> float:
    """Median µs of a call, the L2 cache flushed before each."""
    testing = importlib.import_module("triton.testing")
    return 1e3 * testing.do_bench(call, warmup=5, rep=30, quantiles=[0.5])


class Tuner:
    """Times on one device in one dtype, and writes what it finds as it goes."""

    def __init__(
        self, device: torch.device, dtype: str, clock: Clock, folder: Path | None, rounds: int,
        say: Callable[[str], None],
    ) -> None:  # fmt: skip
        self.device, self.dtype, self.clock, self.rounds = device, dtype, clock, rounds
        self.folder, self.say, self.wrong = folder, say, 0
        self._choice = importlib.import_module("fastlora.kernels.choose.choice")
        self._configs = importlib.import_module("fastlora.kernels.tile.configs")
        self._gpu = self._choice.gpu_name(device)
        self._stamp = {"gpu": self._gpu, **self._choice.versions(), "commit": commit()}
        self._known: dict[tuple[object, ...], dict[str, Any]] = {}

    def subject(self, shape: Shape) -> Subject:
        draw = torch.Generator(self.device)
        draw.seed()
        return Subject(Case(*shape), self.dtype, self.device, draw)

    def kernels(self, shape: Shape, wanted: Sequence[str]) -> None:
        """Finds the fastest config of each kernel for the product, and writes the rows."""
        subject = self.subject(shape)
        with self._reading_own():
            for kernel, job in jobs(subject, self.device).items():
                if kernel not in wanted:
                    continue
                known = (kernel, *job.decides)
                if known not in self._known:
                    self._known[known] = self._fastest_config(kernel, job, subject)
                if self._known[known]:
                    self._write([self._row(kernel, job.key) | self._known[known]])

    def paths(self, shape: Shape) -> None:
        """Finds the fastest path of each op of the layer, with the configs that were written."""
        lora = importlib.import_module("fastlora.backends.triton.linear")
        ledger = importlib.import_module("fastlora.kernels.choose.ledger")
        arch = importlib.import_module("fastlora.kernels.tile.launch").arch_of(self.device)
        subject, rows = self.subject(shape), []
        first = subject.tensors["x"].dtype == torch.float16
        size = subject.tensors["x"].itemsize
        with self._reading_own():
            for name, op in layer_ops(subject).items():
                problem = ledger.Problem(*op.key, size, op.weight)
                can = [p for p in ledger.PATHS if self._choice.possible(p, problem, arch, first)]

                def check(path: str, name: str = name) -> None:
                    subject.verdict(name, partial(getattr(lora, name), path=path))

                best = self._fastest(
                    f"path of {name}", can, check,
                    lambda path, op=op: partial(op.call, path=path), op.base,
                )  # fmt: skip
                if best is not None:
                    found = dict(zip(("path", "us", "base_us"), best, strict=True))
                    row = self._row(f"path of {name}", op.key)
                    rows.append(row | found | {"weight": op.weight})
        self._write(rows)

    def _fastest_config(self, kernel: str, job: Job, subject: Subject) -> dict[str, Any]:
        """Of one kernel, as a row has it; empty where no candidate runs."""
        ledger = importlib.import_module("fastlora.kernels.choose.ledger")
        launch = importlib.import_module("fastlora.kernels.tile.launch")
        fitting = importlib.import_module("fastlora.kernels.tile.fitting")
        size, lora_size = (dtype.itemsize for dtype in DTYPES[self.dtype])
        problem = ledger.Problem(*job.key, size, lora_size=lora_size)
        need = self._choice.need(kernel, problem, self.dtype, launch.arch_of(self.device))
        # Timed as they are launched, written as they ship: each call fits them to its own needs.
        shipped = self._configs.CANDIDATES[kernel]
        fitted = {fitting.fitted(config, need): config for config in reversed(shipped)}

        def check(config: object) -> None:
            for result, start in job.results.values():
                result.fill_(torch.nan) if start is None else result.copy_(start)
            job.launch(config=config)
            for name, (got, _) in job.results.items():
                ratio = error_ratio(got, subject.want[name], subject.unfused[name], self.dtype)
                if not ratio <= 1:
                    raise WrongResult(f"{name} errs by {ratio:.3g} times what is allowed")

        best = self._fastest(
            kernel, list(reversed(fitted)), check, lambda c: partial(job.launch, config=c),
            job.base,
        )  # fmt: skip
        if best is None:
            return {}
        return {"config": dict(vars(fitted[best[0]])), "us": best[1], "base_us": best[2]}

    def _fastest(
        self, what: str, candidates: list[Any], check: Callable[[Any], None],
        call: Callable[[Any], Callable[[], object]], base: Callable[[], object],
    ) -> tuple[Any, float, float] | None:  # fmt: skip
        """The fastest of those that pass their check, its µs and the base's."""
        left = [c for c in candidates if self._passes(what, c, check)]
        times: dict[Any, list[float]] = {candidate: [] for candidate in left}
        bases: list[float] = []
        # In rounds, so that a clock that falls with heat falls for all of them.
        for _ in range(self.rounds):
            bases.append(self.clock(base))
            for candidate in left:
                times[candidate].append(self.clock(call(candidate)))
            medians = {candidate: statistics.median(times[candidate]) for candidate in left}
            limit = _HOPELESS * min(medians.values(), default=0.0)
            left = [candidate for candidate in left if medians[candidate] <= limit]
        if not left:
            return None
        best = min(left, key=lambda candidate: statistics.median(times[candidate]))
        us = statistics.median(times[best])
        return best, round(us, 2), round(statistics.median(bases), 2)

    def _passes(self, what: str, candidate: Any, check: Callable[[Any], None]) -> bool:
        """Whether the candidate runs here and is right; says so if not."""
        try:
            check(candidate)
        except WrongResult as error:
            self.wrong += 1
            self.say(f"WRONG {what} {candidate}: {error}")
            return False
        except Exception as error:  # too many resources, or what the compiler does not take
            if poisoned(self.device):
                raise
            reason = (str(error).strip() or "no reason given").splitlines()[0]
            self.say(f"skipped {what} {candidate}: {type(error).__name__}: {reason}")
            return False
        return True

    def _row(self, kernel: str, key: Shape) -> dict[str, Any]:
        return {
            "kernel": kernel, "dtype": self.dtype, **dict(zip("MKNR", key, strict=True)),
            **self._stamp,
        }  # fmt: skip

    def _write(self, rows: list[dict[str, Any]]) -> None:
        if rows:
            records = importlib.import_module("fastlora.kernels.choose.records")
            records.write(records.file_of(self._gpu), rows, KEYS, self.folder)
        self._choice.forget()

    @contextmanager
    def _reading_own(self) -> Iterator[None]:
        """Kernels take the configs from where this one writes them."""
        before = os.environ.get("FASTLORA_CACHE")
        if self.folder is not None:
            os.environ["FASTLORA_CACHE"] = str(self.folder)
        self._choice.forget()
        try:
            yield
        finally:
            if before is None:
                os.environ.pop("FASTLORA_CACHE", None)
            else:
                os.environ["FASTLORA_CACHE"] = before
            self._choice.forget()


def tune(
    device: torch.device,
    shapes: Sequence[Shape] = SHAPES,
    *,
    dtypes: Sequence[str] = ("bf16",),
    kernels: Sequence[str] | None = None,
    folder: Path | None = None,
    rounds: int = 3,
    clock: Clock = do_bench,
) -> bool:
    """Tunes the kernels, and the paths unless kernels are named; whether nothing was wrong."""
    steps, wrong = len(shapes) * len(dtypes), 0
    with Progress("fastlora tune", steps) as progress:
        for dtype in dtypes:
            with fp32_precision(dtype):
                tuner = Tuner(device, dtype, clock, folder, rounds, progress.say)
                done: set[Shape] = set()
                for shape in shapes:
                    M, K, N, R = shape
                    progress.step(f"{dtype} M={M} K={K} N={N} R={R}")
                    for product in dict.fromkeys((shape, (M, N, K, R))):
                        if product not in done:
                            tuner.kernels(product, kernels or KERNELS)
                            done.add(product)
                    if kernels is None:
                        tuner.paths(shape)
            wrong += tuner.wrong
    return wrong == 0
