"""The dropout mask in Triton: the twin of ``fastlora/backends/dropout.py``, bit for bit.

Computes which elements of a tile survive, from (seed, row, column) alone: Philox4x32-7 with key =
seed and counter = (column // 8, row, 0, 0); lane i of eight 16-bit lanes belongs to column 8 *
group + i. Moves nothing but the mask that ``keep_mask`` stores; kernels call ``keep_tile`` in
registers. Per 8 elements: 7 rounds of 2 wide multiplications and 4 exclusive ors, 8 compares.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def keep_tile(seed, rows, first_group, threshold, BM: tl.constexpr, BG: tl.constexpr):
    """Mask of rows [BM] and columns 8 * first_group … 8 * (first_group + BG): int1 [BM, 8 * BG]."""
    groups = first_group + tl.arange(0, BG)
    c0 = (groups[None, :] + tl.zeros([BM, 1], tl.int32)).to(tl.uint32)  # [BM, BG]
    c1 = (rows[:, None] + tl.zeros([1, BG], tl.int32)).to(tl.uint32)
    zero = c0 * 0
    w0, w1, w2, w3 = tl.philox(seed, c0, c1, zero, zero, n_rounds=7)
    # A join appends an axis of two, so the lane's bits come out lowest last: halves join last.
    low = tl.join(tl.join(w0 & 0xFFFF, w2 & 0xFFFF), tl.join(w1 & 0xFFFF, w3 & 0xFFFF))
    high = tl.join(tl.join(w0 >> 16, w2 >> 16), tl.join(w1 >> 16, w3 >> 16))
    lanes = tl.join(low, high)  # [BM, BG, word bit 1, word bit 0, half]
    return tl.reshape(lanes, [BM, BG * 8]) >= threshold


@triton.jit
def _keep_mask(p_mask, p_seed, M, K, threshold, BM: tl.constexpr, BG: tl.constexpr):
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    first_group = tl.program_id(1) * BG
    columns = first_group * 8 + tl.arange(0, BG * 8)
    b_keep = keep_tile(tl.load(p_seed), rows, first_group, threshold, BM, BG)  # [BM, 8 BG]
    m_mask = (rows[:, None] < M) & (columns[None, :] < K)
    o_mask = rows[:, None].to(tl.int64) * K + columns[None, :]
    tl.store(p_mask + o_mask, b_keep.to(tl.float32), mask=m_mask)


def keep_mask(rows: int, columns: int, threshold: int, seed: torch.Tensor) -> torch.Tensor:
    """Mask (rows, columns) of float32 ones and zeros on seed's device; seed is 0-d int64."""
    mask = torch.empty(rows, columns, dtype=torch.float32, device=seed.device)
    BM, BG = 16, 16
    grid = (triton.cdiv(rows, BM), triton.cdiv(columns, BG * 8))
    if mask.numel():
        with torch.cuda.device_of(seed):
            _keep_mask[grid](
                mask, seed, rows, columns, threshold, BM=BM, BG=BG, enable_fp_fusion=True
            )
    return mask
