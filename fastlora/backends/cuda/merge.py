"""Merging on the CUDA kernels: any strides, any alignment, weights and adapters of three dtypes."""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastlora.backends import native
from fastlora.backends.cuda.call import stream_of
from fastlora.kernels.tile.gpu import arch_of, device_of

# As csrc/fastlora.h numbers them.
_UNDO, _MERGE, _KEEP, _SUMS, _POOLED, _ALIGNED = (1 << i for i in range(6))


class CudaKernels:
    """csrc/cuda/merge/merge.cu, as a batch calls it."""

    tile = (64, 64)

    def swap(
        self, batch: Any, tables: Any, wanted: int, before: tuple[Tensor, Tensor, Tensor],
        kind: Any, how: Any, *, keep: bool, pooled: bool,
    ) -> None:  # fmt: skip
        flags = {
            _UNDO: how.undo, _MERGE: how.merge, _KEEP: keep, _SUMS: how.sums, _POOLED: pooled,
            _ALIGNED: kind.aligned and kind.inner == 1,
        }  # fmt: skip
        given = (
            *tables[:4], batch.states, *before, batch.checksums, batch.counts, batch.offsets,
            batch.cursor, batch.pool,
        )  # fmt: skip
        with device_of(batch.states):
            code = native.cuda_functions().fastlora_cuda_swap(
                *(t.data_ptr() for t in given), batch.tiles, batch.capacity, int(wanted),
                native.DTYPES[kind.dtype], native.DTYPES[kind.old], native.DTYPES[kind.new],
                sum(flag for flag, on in flags.items() if on), stream_of(batch.states),
            )  # fmt: skip
        native.check(code, "merging")

    def gather(
        self, positions: Tensor, bits: Tensor, pool: Tensor, starts: Tensor, offsets: Tensor,
        counts: Tensor,
    ) -> None:  # fmt: skip
        given = (positions, bits, pool, starts, offsets, counts)
        dtype = torch.float32 if bits.itemsize == 4 else torch.bfloat16
        with device_of(pool):
            code = native.cuda_functions().fastlora_cuda_gather(
                *(t.data_ptr() for t in given), counts.numel(), native.DTYPES[dtype],
                stream_of(pool),
            )  # fmt: skip
        native.check(code, "merging")


# The host's part, which Triton's kernels share: tables, what a launch left behind, the way back.
_ops = importlib.import_module("fastlora.backends.merge_lists.host")
_kernels = CudaKernels()

merge_ = partial(_ops.merge_, _kernels)
unmerge_ = partial(_ops.unmerge_, _kernels)
swap_ = partial(_ops.swap_, _kernels)


def merge_kernel(device: torch.device) -> str:
    """The arithmetic of d: another architecture's or compiler's may have other bits."""
    where = "host" if native.cuda_on_host() else f"sm_{arch_of(device)}"
    compiler = native.cuda_functions().fastlora_cuda_compiler().decode()
    return f"cuda-merge-1 {where} {compiler}"
