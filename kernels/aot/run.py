"""Every kernel compiled for every target without a GPU, and its machine code checked.

``python -m fastlora.kernels.aot`` calls the launchers themselves, with the installed triton's own
specialisation of their arguments, on CPU tensors that nothing ever reads: a driver that only names
a target stands for the GPU, and a launch ends where the kernel is compiled. So what is checked is
what a call would run. Prints a table of all kernels; exit code 1 if any fails a check.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import astuple, replace
from multiprocessing import get_context

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from fastlora.kernels.aot import checks as aot_checks
from fastlora.kernels.aot.cases import (
    ARCHS,
    CONSUMER,
    DTYPES,
    KERNELS,
    ODD_K,
    ODD_M,
    ODD_N,
    ODD_R,
    Case,
    K,
    M,
    N,
    cases,
)
from fastlora.kernels.aot.merge import launch_gather, launch_merge, spare
from fastlora.kernels.aot.multi import launch_multi
from fastlora.kernels.linear.expand import expand
from fastlora.kernels.linear.gemm import gemm
from fastlora.kernels.linear.gradient import gradient
from fastlora.kernels.linear.one_pass import one_pass
from fastlora.kernels.linear.shrink import shrink
from fastlora.kernels.tile import numerics
from fastlora.kernels.tile.launch import Dropout
from fastlora.kernels.tile.philox import keep_mask

MERGE_PRODUCTS = {90: "wgmma.mma_async", 100: "tcgen05.mma"}


class Target:
    """Stands for triton's driver where there is no GPU: it only says what to compile for."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def compiling(arch: int) -> Iterator[list]:
    """Launches in here compile and do not launch; the list gathers what they compiled."""
    if numerics.INTERPRETED.value:
        raise RuntimeError("TRITON_INTERPRET: expected unset, interpreted kernels have no code")
    compiled, run, active = [], JITFunction.run, driver._active

    def compile_only(self, *args, grid, warmup, **options):
        compiled.append(run(self, *args, grid=grid, warmup=True, **options))
        self.device_caches.clear()  # thousands of kernels with all their code are a gigabyte

    driver.set_active(Target(arch))
    JITFunction.run = compile_only
    try:
        yield compiled
    finally:
        JITFunction.run = run
        driver._active = active


def launch(case: Case) -> None:
    """Calls the kernel's launcher as ``product`` and ``lora`` do, with operands of no values."""
    v, config = case.variant, case.config
    dtype, lora_dtype = DTYPES[case.dtype]
    if case.kernel.startswith("multi_"):
        launch_multi(case, dtype, lora_dtype)
        return
    if case.kernel == "merge":
        launch_merge(case, dtype, lora_dtype)
        return
    if case.kernel == "gather":
        launch_gather(dtype)
        return
    m, n, k, rank = (ODD_M, ODD_N, ODD_K, ODD_R) if v.odd else (M, N, K, v.rank)
    m, n, k, rank = (1, 1, 1, 1) if v.one else (m, n, k, rank)
    if case.kernel == "one_pass" and not v.one:
        m = 1 if v.few else config.BM - v.odd
    elif v.few:
        m = 64

    def matrix(rows: int, columns: int, dtype: torch.dtype = dtype, turned: bool = False) -> Tensor:
        if turned:
            return matrix(columns, rows, dtype).T
        # One element past the alignment that allocators give.
        return torch.empty(rows * columns + 1, dtype=dtype)[int(v.odd) :][: rows * columns].view(
            rows, columns
        )

    def vector(dtype: torch.dtype) -> Tensor | None:
        return torch.empty(n, dtype=dtype) if v.biases else None

    x, y, h = matrix(m, k), matrix(m, n), matrix(m, rank)
    w = matrix(k, n, turned=not v.backward)
    a = matrix(rank, k, lora_dtype, turned=v.backward)
    b = matrix(rank, n, lora_dtype, turned=not v.backward)
    drop = Dropout.of(0.1, torch.tensor(1)) if v.drops else None
    added = {"bias": vector(dtype), "lora_bias": vector(lora_dtype)}
    if case.kernel == "one_pass":
        w = None if v.no_weight else w
        one_pass(x, w, a, b, y, h, 2.0, config, drop=drop, drops_x=v.drops == "x", **added)
    elif case.kernel.startswith("shrink"):
        scaled = None if v.first else torch.empty_like(h)
        shrink(x, a, h, config, scaled=scaled, factor=2.0, drop=drop, overlap=v.overlap)
    elif case.kernel in ("gemm", "gemm_tma"):
        gemm(
            x, w, y, h, b, 2.0, config, tma=case.kernel == "gemm_tma", programs=132,
            first=v.first, drop=drop, overlap=v.overlap, **added,
        )  # fmt: skip
    elif case.kernel == "expand":
        expand(y, h, b, 2.0, config, add=v.no_weight, drop=drop, **added)
    elif case.kernel == "gradient":
        gradient(x, h, matrix(rank, k, lora_dtype, turned=v.backward), 2.0, config, drop=drop)
    else:
        keep_mask(m, k, 6554, torch.tensor(1))


@contextmanager
def float32_as(dtype: str) -> Iterator[None]:
    """torch's own setting, which says how float32 enters a product, as ``dtype`` has it."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if dtype == "tf32" else "ieee"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def compile_case(case: Case) -> list[aot_checks.Row]:
    """Rows of what the case's launch compiles, most often one; a failure is a row too."""
    start = time.perf_counter()
    config = ",".join(map(str, astuple(case.config))) if case.config else "-"
    names = {"dtype": case.dtype, "config": config, "arch": case.arch, "variant": str(case.variant)}
    try:
        with compiling(case.arch) as compiled, float32_as(case.dtype):
            launch(case)
    except Exception as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        return [aot_checks.Row(kernel=case.kernel, **names, faults=(f"does not compile: {text}",))]
    seconds = (time.perf_counter() - start) / len(compiled)
    rows, parked = [], spare(case) if case.kernel == "merge" else None
    for kernel in compiled:
        needs = needed_instructions(case) if kernel.name != "_add_parts" else ()
        row = aot_checks.examine(kernel, case.arch, needs, case.variant.odd, parked)
        name = kernel.name.lstrip("_") + "_tma" * case.kernel.endswith("_tma")
        rows.append(replace(row, kernel=name, seconds=seconds, **names))
    return rows


def needed_instructions(case: Case) -> tuple[str, ...]:
    """Instructions without which the kernel would be slow: they must be in its PTX."""
    instructions = []
    kernel = case.kernel.removeprefix("multi_")
    if kernel == "gemm_tma":
        instructions += ["cp.async.bulk.tensor.2d.shared", "cp.async.bulk.tensor.2d.global"]
    if case.variant.overlap:
        waits = "launch_dependents" if "shrink" in kernel else "wait"
        instructions.append(f"griddepcontrol.{waits}")
    # A group of four warps multiplies 64 rows at a time.
    if kernel == "merge":
        # All of them: what is taken out must be multiplied as it was when it was put in.
        instructions.append(MERGE_PRODUCTS.get(case.arch, "mma.sync"))
    rows = {"gemm": 64, "gemm_tma": 64, "one_pass": 128}.get(kernel)
    if rows and rows <= case.config.BM and case.dtype != "fp32" and not case.variant.no_weight:
        instructions.append({90: "wgmma.mma_async", 100: "tcgen05.mma"}.get(case.arch, "mma.sync"))
    return tuple(instructions)


def compile_all(chosen: Iterable[Case], jobs: int) -> Iterator[aot_checks.Row]:
    if jobs == 1:
        for case in chosen:
            yield from compile_case(case)
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        for rows in pool.map(compile_case, chosen, chunksize=4):
            yield from rows


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("fastlora.kernels.aot", description=__doc__.splitlines()[0])
    parser.add_argument("--sample", action="store_true", help="a small part: defaults, two dtypes")
    parser.add_argument("--arch", type=int, choices=ARCHS + CONSUMER, action="append")
    parser.add_argument("--kernel", choices=KERNELS, action="append")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args(arguments)
    if numerics.INTERPRETED.value:
        parser.error("TRITON_INTERPRET: expected unset, interpreted kernels have no code")
    # Of consumers' targets the defaults, to see that they fit.
    archs = options.arch or ARCHS + CONSUMER * options.sample
    kernels = options.kernel or KERNELS
    pairs = [(k, arch) for k in kernels for arch in archs if not k.endswith("_tma") or arch >= 90]
    chosen = [case for k, arch in pairs for case in cases(arch, k, options.sample)]
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as fresh:
        os.environ.setdefault("TRITON_CACHE_DIR", fresh)  # nothing stale is read
        rows = []
        for row in compile_all(chosen, options.jobs):
            rows.append(row)
            for fault in row.faults:
                print(f"FAILED {row.label()}: {fault}", flush=True)
    print("\n".join(aot_checks.table(rows)))
    failed = sum(bool(row.faults) for row in rows)
    seconds = time.perf_counter() - start
    print(f"triton {triton.__version__}: {len(rows)} compiled, {failed} failed, {seconds:.0f} s")
    return 1 if failed else 0
