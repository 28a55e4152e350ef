"""What ``aot`` compiles of the kernels for many adapters: their launchers and forms of a call."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlora.kernels.aot.cases import ODD_K, ODD_M, ODD_N, ODD_R, Case, K, M, N, Variant
from fastlora.kernels.multi.batch import KernelAdapters, KernelRows
from fastlora.kernels.multi.decode import multi_decode
from fastlora.kernels.multi.expand import multi_expand
from fastlora.kernels.multi.gemm import multi_gemm
from fastlora.kernels.multi.gradient import multi_gradient
from fastlora.kernels.multi.shrink import multi_shrink

SLOTS, PAGE = 32, 8


def launch_multi(case: Case, dtype: torch.dtype, lora_dtype: torch.dtype) -> None:
    """Calls the kernel's launcher as ``multi_product`` and ``multi`` do; nothing is ever read."""
    v, config = case.variant, case.config
    t, n, k, rank = (ODD_M, ODD_N, ODD_K, ODD_R) if v.odd else (M, N, K, v.rank)
    t, n, k, rank = (1, 1, 1, 1) if v.one else (t, n, k, rank)
    t = min(t, config.BM) if case.kernel == "multi_decode" else t
    ends = (n // 2, n // 2 + n // 4, n) if v.packed else (n,)

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        # One element past the alignment that allocators give.
        size = torch.Size(shape).numel()
        return torch.empty(size + 1, dtype=dtype)[int(v.odd) :][:size].view(shape)

    def counts(dtype: torch.dtype, size: int) -> Tensor:
        return torch.empty(size, dtype=dtype)

    x, y = empty(t, k), empty(t, n)
    w = empty(k, n) if v.backward else empty(n, k).T
    h_out = empty(t, len(ends) * rank)
    h = torch.empty(4, *h_out.shape) if v.split else h_out
    if v.paged:
        # Slots of as many pages as the rank needs.
        table = torch.empty(SLOTS, -(-rank // PAGE), dtype=torch.int32)
        a = empty(64, len(ends) * PAGE, k, dtype=lora_dtype)
        adapters = KernelAdapters.of(a, empty(64, PAGE, n, dtype=lora_dtype).transpose(1, 2), table)
    else:
        a = empty(SLOTS, len(ends) * rank, k, dtype=lora_dtype)
        adapters = KernelAdapters.of(a, empty(SLOTS, n, rank, dtype=lora_dtype))
        if v.backward:
            of_dy = empty(SLOTS, rank, n, dtype=lora_dtype).transpose(1, 2)
            adapters = KernelAdapters.of(of_dy, empty(SLOTS, k, rank, dtype=lora_dtype)).turned
    ids, order = counts(torch.int32, t), counts(torch.int64, t)
    optional = (counts(torch.int32, SLOTS), counts(torch.float32, t)) if v.biases else (None, None)
    rows = KernelRows.of(ids, order, counts(torch.float32, SLOTS), *optional)
    bias = empty(n) if v.biases else None
    if case.kernel == "multi_shrink":
        scaled = None if v.split or v.first else torch.empty_like(h_out)
        multi_shrink(
            x, adapters, rows, h, config, slices=len(ends), scaled=scaled, overlap=v.overlap
        )
    elif case.kernel == "multi_expand":
        multi_expand(y, h, adapters, rows, ends, config, out=h_out)
    elif case.kernel == "multi_decode":
        multi_decode(
            x, w, y, h, adapters, rows, ends, config, out=h_out, bias=bias, overlap=v.overlap
        )
    elif case.kernel == "multi_gradient":
        out = empty(SLOTS, rank, k, dtype=lora_dtype)
        multi_gradient(x, h_out, out, rows, counts(torch.int64, SLOTS + 1), config)
    else:
        multi_gemm(
            x, w, y, h_out, adapters, rows, ends, config, tma=case.kernel.endswith("_tma"),
            programs=132, first=v.first, bias=bias, overlap=v.overlap,
        )  # fmt: skip


def main_forms() -> tuple[Variant, ...]:
    return Variant(biases=True), Variant(64, biases=True, paged=True)


def forms(kernel: str, arch: int, sample: bool) -> tuple[Variant, ...]:
    """``biases``: ranks and row scales too."""
    every, paged = Variant(biases=True), Variant(64, biases=True, paged=True, packed=True)
    if kernel in ("multi_shrink", "multi_decode", "multi_expand"):
        every, paged = (Variant(**vars(v) | {"split": True}) for v in (every, paged))
    if kernel == "multi_gradient":
        paged = Variant(64)
    if sample:
        return every, paged
    variants = [every, paged, Variant(), Variant(512, biases=True)]
    if kernel in ("multi_shrink", "multi_decode") or kernel.startswith("multi_gemm"):
        variants += [Variant(overlap=True), Variant(64, overlap=True)] if arch >= 90 else []
    if kernel != "multi_gradient":
        variants += [Variant(packed=True), Variant(paged=True)]
    if kernel.startswith("multi_gemm"):
        variants += [Variant(first=True), Variant(64, biases=True, paged=True, first=True)]
    if kernel != "multi_gemm_tma":
        variants += [Variant(odd=True), Variant(odd=True, paged=True), Variant(one=True)]
    return tuple(variants)
