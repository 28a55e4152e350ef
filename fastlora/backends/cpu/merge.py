"""Merging and its undoing on the native kernels: the bits of ``backends/torch/merge.py``.

The receipts have the same parts; the delta is summed another way, so one's receipt is not good for
the other.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from fastlora.backends import native
from fastlora.backends.dtypes import BITS
from fastlora.backends.in_place import mark_written
from fastlora.backends.merge_lists import errors
from fastlora.backends.merge_lists.one_by_one import OneByOne
from fastlora.backends.torch import merge as exact


def merge_kernel(device: torch.device) -> str:
    """Named in every receipt: float32 sums of fused multiply-adds in the order of the ranks.

    They have the same bits on every machine.
    """
    return "fma-1"


def merge_one_(
    weight: Tensor,
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    scalings: Sequence[float],
    receipt: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Adds the adapters to weight (N, K) in place; returns (positions, bits, counts, checksums)."""
    library, handle, parts = native.functions(), ctypes.c_void_p(), exact.nothing(weight)
    A, B = _factors(weight, lora_A, lora_B, scalings)
    args = _merge_arguments(weight, A, B)
    try:
        code = library.fastlora_merge(*args, ctypes.byref(handle) if receipt else None)
        if code == native.NOT_FINITE:
            raise ValueError(errors.NOT_FINITE)
        native.check(code, "merge_")
        if receipt:
            parts = _room(weight, library.fastlora_receipt_size(handle))
            code = library.fastlora_receipt_read(handle, *(t.data_ptr() for t in parts))
            native.check(code, "merge_")
        mark_written(weight)
    except BaseException:
        # Interrupted or out of memory after the weight was written: the receipt is there or here.
        if handle and library.fastlora_receipt_undo(*args, handle) != native.OK:
            library.fastlora_unmerge(*args, *_read(parts))
        raise
    finally:
        library.fastlora_receipt_free(handle)
    return parts


def unmerge_one_(
    weight: Tensor,
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    scalings: Sequence[float],
    positions: Tensor,
    bits: Tensor,
    counts: Tensor,
    checksums: Tensor,
) -> None:
    """Gives weight (N, K) every bit back that ``merge_`` found, or raises and changes nothing."""
    A, B = _factors(weight, lora_A, lora_B, scalings)
    exact.check_parts(weight, positions, bits, counts, checksums)
    parts = (positions.contiguous(), bits.contiguous(), counts.contiguous(), checksums.contiguous())
    code = native.functions().fastlora_unmerge(*_merge_arguments(weight, A, B), *_read(parts))
    if code == native.NOT_MERGED:
        raise RuntimeError(errors.NOT_MERGED)
    if code == native.NOT_RESTORED:
        raise RuntimeError(exact.NOT_RESTORED)
    native.check(code, "unmerge_")
    mark_written(weight)


_ops = OneByOne(merge_one_, unmerge_one_)
merge_, unmerge_, swap_ = _ops.merge_, _ops.unmerge_, _ops.swap_


def _factors(
    weight: Tensor, lora_A: Sequence[Tensor], lora_B: Sequence[Tensor], scalings: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """All adapters as one: A (R, K), and B (N, R) with the scalings, in float32."""
    A = [a.to(torch.float32) for a in lora_A]
    B = [_scaled(b, s) for b, s in zip(lora_B, scalings, strict=True)]
    if len(A) == 1:
        return A[0].contiguous(), B[0].contiguous()
    N, K = weight.shape
    none = weight.new_empty(0, K, dtype=torch.float32), weight.new_empty(N, 0, dtype=torch.float32)
    return torch.cat([none[0], *A]), torch.cat([none[1], *B], 1)


def _scaled(lora_B: Tensor, scaling: float) -> Tensor:
    """The product in float32: rounded once, but for a float32 lora_B by a wider scaling."""
    if lora_B.dtype != torch.float64 and ctypes.c_float(scaling).value == scaling:
        return lora_B.to(torch.float32) * scaling
    return (lora_B.to(torch.float64) * scaling).to(torch.float32)


def _merge_arguments(weight: Tensor, A: Tensor, B: Tensor) -> tuple[int, ...]:
    return (
        weight.data_ptr(), *weight.stride(), A.data_ptr(), B.data_ptr(), *weight.shape, A.shape[0],
        native.DTYPES[weight.dtype], torch.get_num_threads(),
    )  # fmt: skip


def _room(weight: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        torch.empty(size, dtype=torch.int16),
        torch.empty(size, dtype=BITS[weight.itemsize]),
        torch.empty(sum(1 for _ in exact.tiles(weight)), dtype=torch.int32),
        torch.empty(2, dtype=torch.int64),
    )


def _read(parts: Sequence[Tensor]) -> tuple[int, ...]:
    positions, bits, counts, checksums = parts
    pointers = (positions.data_ptr(), bits.data_ptr(), counts.data_ptr())
    return (*pointers, positions.numel(), checksums.data_ptr())
