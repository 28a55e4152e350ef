"""Merging and its undoing on the native kernels; ``fastlora/exact.py`` is their twin in torch.

The receipts have the same parts; the delta is summed another way, so one's receipt is not good for
the other.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from fastlora import exact, native

# Named in every receipt: float32 sums of fused multiply-adds in the order of the ranks, which have
# the same bits on every machine.
KERNEL = "fma-1"


def merge_(
    weight: Tensor,
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    scalings: Sequence[float],
    receipt: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Adds the adapters to weight (N, K) in place; returns (positions, bits, counts, checksums)."""
    library, handle = native.functions(), ctypes.c_void_p()
    A, B = _factors(weight, lora_A, lora_B, scalings)
    args = _merge_arguments(weight, A, B)
    try:
        code = library.fastlora_merge(*args, ctypes.byref(handle) if receipt else None)
        if code == native.NOT_FINITE:
            raise ValueError(
                "adapters: merging gives values that are not finite; the weight is unchanged"
            )
        native.check(code, "merge_")
        parts = _receipt(weight, handle) if receipt else exact.nothing(weight)
        _written(weight)
    except BaseException:
        # Interrupted or out of memory after the weight was written.
        if handle:
            library.fastlora_receipt_undo(*args, handle)
        raise
    finally:
        library.fastlora_receipt_free(handle)
    return parts


def unmerge_(
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
    wanted = (torch.int16, exact.BITS[weight.itemsize], torch.int32, torch.int64)
    given = (positions, bits, counts, checksums)
    tiles = sum(1 for _ in exact.tiles(weight))
    sizes = (positions.numel(), positions.numel(), tiles, 2)
    if any(t.dtype != d or t.numel() != n for t, d, n in zip(given, wanted, sizes, strict=True)):
        raise RuntimeError(exact.NOT_RESTORED)
    parts = (positions.contiguous(), bits.contiguous(), counts.contiguous(), checksums.contiguous())
    code = native.functions().fastlora_unmerge(*_merge_arguments(weight, A, B), *_read(parts))
    if code == native.NOT_MERGED:
        raise RuntimeError(exact.NOT_MERGED)
    if code == native.NOT_RESTORED:
        raise RuntimeError(exact.NOT_RESTORED)
    native.check(code, "unmerge_")
    _written(weight)


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


def _receipt(weight: Tensor, handle: ctypes.c_void_p) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    library = native.functions()
    size, bits = library.fastlora_receipt_size(handle), exact.BITS[weight.itemsize]
    parts = (
        torch.empty(size, dtype=torch.int16),
        torch.empty(size, dtype=bits),
        torch.empty(sum(1 for _ in exact.tiles(weight)), dtype=torch.int32),
        torch.empty(2, dtype=torch.int64),
    )
    code = library.fastlora_receipt_read(handle, *(t.data_ptr() for t in parts))
    native.check(code, "merge_")
    return parts


def _read(parts: Sequence[Tensor]) -> tuple[int, ...]:
    positions, bits, counts, checksums = parts
    pointers = (positions.data_ptr(), bits.data_ptr(), counts.data_ptr())
    return (*pointers, positions.numel(), checksums.data_ptr())


def _written(weight: Tensor) -> None:
    """What a kernel writes, torch does not see."""
    if not weight.is_inference():
        increment_version([weight])
