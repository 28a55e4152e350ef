"""What the functions of many adapters accept; ``checks`` has what they share with the others."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastlora.backends.packed import ends_of
from fastlora.backends.values import Adapters
from fastlora.functional.checks.linear import input_of, matrix_of, output_of, pair, tensor, vector


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scalings: Tensor,
    ranks: Tensor | None,
    slices: Sequence[int] | None,
    page_table: Tensor | None,
) -> Adapters:
    """Returns the adapters of ``multi_lora_linear``, dense or packed."""
    N, K = matrix_of(weight)
    input_of(x, K, weight.dtype, weight.device)
    packed = slices is not None or page_table is not None
    if packed:
        vector("bias", bias, N, x.dtype, x)
    tensor("lora_A", lora_A)
    tensor("lora_B", lora_B)
    if not packed:
        _dense(lora_A, lora_B, scalings, ranks, N, K, x)
        vector("bias", bias, N, x.dtype, x)
        return Adapters(lora_A, lora_B)
    return _packed(N, K, lora_A, lora_B, scalings, ranks, slices, page_table, x)


def added(
    y: Tensor,
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scalings: Tensor,
    ranks: Tensor | None,
    slices: Sequence[int] | None,
    page_table: Tensor | None,
) -> Adapters:
    """Returns the adapters of ``multi_lora_add_``, dense or packed."""
    tensor("lora_A", lora_A)
    tensor("lora_B", lora_B)
    K = lora_A.shape[2] if lora_A.dim() == 3 else -1
    if slices is None and page_table is None:
        N = lora_B.shape[1] if lora_B.dim() == 3 else -1
        _dense(lora_A, lora_B, scalings, ranks, N, K, x)
        output_of(y, x, N, K)
        return Adapters(lora_A, lora_B)
    adapters = _packed(None, K, lora_A, lora_B, scalings, ranks, slices, page_table, x)
    output_of(y, x, adapters.ends[-1], K)
    return adapters


def slot_count(num_slots: int) -> None:
    if not isinstance(num_slots, int) or isinstance(num_slots, bool):
        raise TypeError(f"num_slots: expected an int, got {type(num_slots).__name__}")
    if num_slots < 0:
        raise ValueError(f"num_slots: expected a count of adapter slots, got {num_slots}")


def row_scales(scales: Tensor, x: Tensor) -> Tensor:
    """One number a row (T,), from row_scales of shape (T,) or a leading part of x's."""
    tensor("row_scales", scales)
    lead = tuple(x.shape[:-1])
    if not scales.is_floating_point() or scales.device != x.device:
        raise TypeError(
            f"row_scales: expected floats on {x.device}, got {scales.dtype} on {scales.device}"
        )
    if lead[: scales.dim()] != tuple(scales.shape) or scales.dim() == 0:
        raise ValueError(
            f"row_scales: expected shape {lead[:1]} or {lead}, got {tuple(scales.shape)}"
        )
    inner = lead[scales.dim() :]
    scales = scales.reshape(-1)
    return scales.repeat_interleave(math.prod(inner)) if inner else scales


def _dense(
    lora_A: Tensor,
    lora_B: Tensor,
    scalings: Tensor,
    ranks: Tensor | None,
    N: int,
    K: int,
    x: Tensor,
) -> None:
    shape = lora_A.shape
    if len(shape) != 3 or shape[2] != K:
        raise ValueError(f"lora_A: expected shape (S, R, {K}), got {tuple(shape)}")
    S, R = shape[0], shape[1]
    if lora_B.shape != (S, N, R):
        raise ValueError(f"lora_B: expected shape ({S}, {N}, {R}), got {tuple(lora_B.shape)}")
    pair(lora_A, lora_B, x)
    _factors(scalings, ranks, S, x)


def _factors(scalings: Tensor, ranks: Tensor | None, S: int, x: Tensor) -> None:
    vector("scalings", scalings, S, torch.float32, x)
    if ranks is not None:
        tensor("ranks", ranks)
        if ranks.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"ranks: expected int32 or int64, got {ranks.dtype}")
        vector("ranks", ranks, S, ranks.dtype, x)


def _packed(
    N: int | None,
    K: int,
    lora_A: Tensor,
    lora_B: Tensor,
    scalings: Tensor,
    ranks: Tensor | None,
    slices: Sequence[int] | None,
    page_table: Tensor | None,
    x: Tensor,
) -> Adapters:
    """Slots or pages of a projection of C slices, one if ``slices`` is None; N None: lora_B's."""
    if page_table is not None:
        _table(page_table, x)
    across, along = (1, 2) if page_table is None else (2, 1)
    if lora_B.dim() != 3 or N not in (None, lora_B.shape[across]):
        n = "N" if N is None else N
        expected = f"(S, {n}, R)" if page_table is None else f"(P, page, {n})"
        raise ValueError(f"lora_B: expected shape {expected}, got {tuple(lora_B.shape)}")
    ends = ends_of(slices, lora_B.shape[across])
    count, R = lora_B.shape[0], lora_B.shape[along]
    if lora_A.shape != (count, len(ends) * R, K):
        raise ValueError(
            f"lora_A: expected shape {(count, len(ends) * R, K)}, {R} ranks for each of "
            f"{len(ends)} slices, got {tuple(lora_A.shape)}"
        )
    pair(lora_A, lora_B, x)
    _factors(scalings, ranks, count if page_table is None else page_table.shape[0], x)
    # As the ops have pages: B's are rank-major in memory, and here a view.
    lora_B = lora_B if page_table is None else lora_B.transpose(1, 2)
    return Adapters(lora_A, lora_B, page_table, ends)


def _table(page_table: Tensor, x: Tensor) -> None:
    tensor("page_table", page_table)
    shape = tuple(page_table.shape)
    if page_table.dtype != torch.int32:
        raise TypeError(f"page_table: expected int32, got {page_table.dtype}")
    if len(shape) != 2:
        raise ValueError(f"page_table: expected shape (S, pages a slot), got {shape}")
    if page_table.device != x.device:
        raise ValueError(f"page_table: expected the device {x.device}, got {page_table.device}")
