"""Up to 64 rows with an adapter each on the CUDA kernels, packed projections and pages included.

Taken: float16 and bfloat16 with adapters of the same or float32; K, N, R, pages, slices and strides
multiples of 8, addresses of 16 bytes; lora_A with unit columns, lora_B with unit columns or, as in
rank-major pages, unit rows. Each row's bits are the same in any batch.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from fastlora.backends import native
from fastlora.backends.cuda.call import (
    SMALL,
    arch_of,
    chunks,
    device_of,
    halves,
    pointer,
    stream_of,
)
from fastlora.backends.in_place import mark_written, share_memory
from fastlora.backends.values import Adapters, Rows

MOST_ROWS, MOST_RANKS, MOST_SLICES = 64, 512, 8


def multi_lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, adapters: Adapters, rows: Rows,
    invariant: bool = False, path: str | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    adapters = adapters._replace(ends=(weight.shape[0],))
    y = x.new_empty(x.shape[0], weight.shape[0])
    return y, _run(y, x, weight, bias, adapters, rows)


def multi_lora_add_(
    y: Tensor, h: Tensor, x: Tensor, adapters: Adapters, rows: Rows,
    invariant: bool = False, path: str | None = None,
) -> None:  # fmt: skip
    adapters = adapters._replace(ends=(y.shape[1],))
    h.copy_(_run(y, x, None, None, adapters, rows))
    mark_written(y)


def packed_lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, adapters: Adapters, rows: Rows,
    invariant: bool = False, path: str | None = None,
) -> Tensor:  # fmt: skip
    y = x.new_empty(x.shape[0], weight.shape[0])
    _run(y, x, weight, bias, adapters, rows)
    return y


def packed_lora_add_(
    y: Tensor, x: Tensor, adapters: Adapters, rows: Rows,
    invariant: bool = False, path: str | None = None,
) -> None:  # fmt: skip
    _run(y, x, None, None, adapters, rows)
    mark_written(y)


def refuse_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, adapters: Adapters, rows: Rows,
    invariant: bool = False, path: str | None = None,
) -> str | None:  # fmt: skip
    return _refuse(x, weight, adapters._replace(ends=(weight.shape[0],)), invariant)


def refuse_add(
    y: Tensor, h: Tensor, x: Tensor, adapters: Adapters, rows: Rows,
    invariant: bool = False, path: str | None = None,
) -> str | None:  # fmt: skip
    adapters = adapters._replace(ends=(y.shape[1],))
    return _refuse(x, None, adapters, invariant) or _refuse_output(y, x)


def refuse_packed_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, adapters: Adapters, rows: Rows,
    invariant: bool = False, path: str | None = None,
) -> str | None:  # fmt: skip
    return _refuse(x, weight, adapters, invariant)


def refuse_packed_add(
    y: Tensor, x: Tensor, adapters: Adapters, rows: Rows,
    invariant: bool = False, path: str | None = None,
) -> str | None:  # fmt: skip
    return _refuse(x, None, adapters, invariant) or _refuse_output(y, x)


def _refuse_output(y: Tensor, x: Tensor) -> str | None:
    return "x and y share memory" if share_memory(x, y) else chunks("y", y)


def _refuse(x: Tensor, weight: Tensor | None, adapters: Adapters, invariant: bool) -> str | None:
    """Says why these kernels do not take such a call, or None when they do."""
    lora_A, lora_B, table, ends = adapters
    if invariant:
        # More rows than these kernels take would have other bits.
        return "a batch-invariant product is asked for"
    reason = halves(x, lora_A, lora_B) or chunks("x", x)
    reason = reason or (None if weight is None else chunks("weight", weight))
    reason = reason or chunks("lora_A", lora_A)
    # Whole chunks along either dimension; ranks one by one are then any number.
    if reason is None and chunks("lora_B", lora_B, -1) and chunks("lora_B", lora_B, -2):
        reason = chunks("lora_B", lora_B, -1)
    if reason is not None:
        return reason
    M, R = x.shape[0], lora_B.shape[2]
    pages = 1 if table is None else table.shape[1]
    if M > MOST_ROWS:
        return f"{M} rows are more than {MOST_ROWS}"
    if not (x.numel() and ends[-1] and lora_A.numel() and pages):
        return "there is nothing to multiply"
    if ends[-1] % 8:
        return f"{ends[-1]} columns are no multiple of 8"
    if R % 8 or R * pages > MOST_RANKS:
        return f"rank {R * pages} is no multiple of 8 up to {MOST_RANKS}"
    if len(ends) > MOST_SLICES:
        return f"{len(ends)} slices are more than {MOST_SLICES}"
    single = lora_A.dtype == torch.float32
    if weight is not None and (M > 32 or single) and arch_of(x.device) in SMALL:
        return "more than 32 rows, or float32 adapters, want more shared memory than this GPU has"
    return None


def _run(
    y: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, adapters: Adapters,
    rows: Rows,
) -> Tensor:  # fmt: skip
    """Fills or adds to y; returns h (M, slices * R)."""
    ids, _, _, scalings, ranks, row_scales = rows
    lora_A, lora_B, table, ends = adapters
    (M, K), N, slices = x.shape, y.shape[1], len(ends)
    page, R = lora_B.shape[2], adapters.count_ranks()
    S = lora_A.shape[0] if table is None else table.shape[0]
    h = x.new_empty(M, slices * R)
    ids, scalings = ids.to(torch.int32).contiguous(), scalings.float().contiguous()
    ranks, table = (None if t is None else t.to(torch.int32).contiguous() for t in (ranks, table))
    row_scales = None if row_scales is None else row_scales.float().contiguous()
    bias = None if bias is None else bias.contiguous()
    a_slot, a_rank, _ = lora_A.stride()
    b_slot, b_column, b_rank = lora_B.stride()
    # Of one column or one rank a stride is not looked at, but one of both must be 1.
    if b_rank != 1 and b_column != 1:
        b_rank, b_column = (1, b_column) if page == 1 else (b_rank, 1)
    with device_of(x):
        code = native.cuda_functions().fastlora_cuda_multi_lora_decode(
            y.data_ptr(), y.stride(0) if M > 1 else N, h.data_ptr(),
            x.data_ptr(), x.stride(0) if M > 1 else K,
            pointer(weight), 0 if weight is None else weight.stride(0), pointer(bias),
            lora_A.data_ptr(), a_slot, a_rank * page, a_rank,
            lora_B.data_ptr(), b_slot, b_rank, b_column,
            ids.data_ptr(), scalings.data_ptr(), pointer(ranks), pointer(row_scales),
            pointer(table), 0 if table is None else table.stride(0), lora_A.shape[0], page,
            (ctypes.c_int64 * slices)(*ends), slices, M, K, N, R, S, arch_of(x.device) >= 90,
            native.DTYPES[x.dtype], native.DTYPES[lora_A.dtype], stream_of(x),
        )  # fmt: skip
    native.check(code, "multi_lora_linear")
    return h
