"""Weights changed in place, exactly undone: adapters into them, out of them, one for another.

Computes, tile by tile of every weight of one kind in one launch,

    U = M without d_old, to the bit:  round(M - d_old), then what the receipt holds
    M' = round(U + d_new), and what round(M' - d_new) does not give back of U into a new receipt

with either half left out where there is nothing to take out or to put in. Moves each weight once:
2 * size bytes an element, plus 2 + size bytes for each one that the receipt keeps. A tile is
checked before it is stored: one that is not what the old receipt left, that would not be restored,
or that would become infinite stays as it was, and its state says so; the host then takes the
others back.
A program's place in the receipt's pool is an atomic counter's: the order there is no result, tiles
are put in order afterwards.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlora.kernels.merge.batch import PACK, RAW, Batch, How, Kind, State, Tables
from fastlora.kernels.merge.tile import (
    INFINITE,
    TILE_K,
    TILE_N,
    WEIGHT,
    checksum,
    delta,
    differs,
    magnitude,
    packed,
    pointers,
    put_back,
    raw_of,
    rounded,
    wide,
)
from fastlora.kernels.tile.launch import device_of

FRESH, DONE = tl.constexpr(int(State.FRESH)), tl.constexpr(int(State.DONE))
NOT_FINITE = tl.constexpr(int(State.NOT_FINITE))
NOT_MERGED = tl.constexpr(int(State.NOT_MERGED))
NOT_RESTORED = tl.constexpr(int(State.NOT_RESTORED))
NO_ROOM = tl.constexpr(int(State.NO_ROOM))

_NAMES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.int16: tl.int16,
    torch.int32: tl.int32,
    torch.int64: tl.int64,
}


@triton.jit(do_not_specialize=["wanted", "capacity"])
def _swap(
    weights, adapters, scales, weight_of, states, wanted,
    old_sums, old_counts, old_offsets,
    sums, counts, offsets, pool, cursor, capacity,
    DTYPE: tl.constexpr, RAW: tl.constexpr, OLD: tl.constexpr, NEW: tl.constexpr,
    OLD_PRECISION: tl.constexpr, NEW_PRECISION: tl.constexpr,
    PACK: tl.constexpr, INNER: tl.constexpr, ALIGNED: tl.constexpr, LORA_ALIGNED: tl.constexpr,
    UNDO: tl.constexpr, MERGE: tl.constexpr, KEEP: tl.constexpr, SUMS: tl.constexpr,
    POOLED: tl.constexpr,
):  # fmt: skip
    """weights (weights, WEIGHT) int64: pointer, strides of rows and columns, N, K, its first tile,
    tiles across, first and number of the adapters to take out and of those to put in, pointers to
    the old receipt's positions and bits (POOLED: the first to the pool that has both). INNER: the
    dimension of unit stride, 2 if there is none.
    """
    tile = tl.program_id(0).to(tl.int64)
    if tl.load(states + tile) != wanted:
        return
    p = weights + tl.load(weight_of + tile).to(tl.int64) * WEIGHT
    N, K = tl.load(p + 3), tl.load(p + 4)
    if ALIGNED:
        N, K = N // 8 * 8, K // 8 * 8
    place, across = tile - tl.load(p + 5), tl.load(p + 6)
    first_n, first_k = place // across * TILE_N, place % across * TILE_K
    o_n, o_k = tl.arange(0, TILE_N), tl.arange(0, TILE_K)
    n, k = first_n + o_n, first_k + o_k
    m_w = (n < N)[:, None] & (k < K)[None, :]
    found = tl.load(pointers(p, n, k, RAW, INNER, ALIGNED), mask=m_w, other=0)  # [TILE_N, TILE_K]

    b_w = found
    state = tl.full([], DONE, tl.int32)
    if UNDO:
        if SUMS:
            if checksum(found) != tl.load(old_sums + 2 * tile):
                state = tl.full([], NOT_MERGED, tl.int32)
        if state == DONE:
            d = delta(
                adapters, scales, tl.load(p + 7).to(tl.int32), tl.load(p + 8).to(tl.int32),
                n, k, N, K, OLD, OLD_PRECISION, LORA_ALIGNED,
            )  # fmt: skip
            back = rounded(wide(found, DTYPE) - d, DTYPE)
            p_tile = pointers(p, n, k, RAW, INNER, ALIGNED)
            tl.store(p_tile, raw_of(back, DTYPE, RAW), mask=m_w)
            # What subtraction does not give back goes straight to its place, after the rest.
            tl.debug_barrier()
            at, count = tl.load(old_offsets + tile), tl.load(old_counts + tile)
            put_back(p, at, count, first_n, first_k, N, K, RAW, PACK, POOLED)
            tl.debug_barrier()
            b_w = tl.load(pointers(p, n, k, RAW, INNER, ALIGNED), mask=m_w, other=0)
            if SUMS:
                if checksum(b_w) != tl.load(old_sums + 2 * tile + 1):
                    state = tl.full([], NOT_RESTORED, tl.int32)
    if MERGE:
        if state == DONE:
            d = delta(
                adapters, scales, tl.load(p + 9).to(tl.int32), tl.load(p + 10).to(tl.int32),
                n, k, N, K, NEW, NEW_PRECISION, LORA_ALIGNED,
            )  # fmt: skip
            merged = rounded(wide(b_w, DTYPE) + d, DTYPE)
            if tl.max(tl.max(magnitude(merged), 1), 0) >= INFINITE:
                # Seldom, so looked at closely only here: infinities and NaN that were there pass.
                d = tl.where(m_w, d, 0.0)
                merged = rounded(wide(b_w, DTYPE) + d, DTYPE)
                was_finite = magnitude(wide(b_w, DTYPE)) < INFINITE
                bad = (magnitude(merged) >= INFINITE) & was_finite
                if tl.max(tl.max(bad.to(tl.int32), 1), 0) > 0:
                    state = tl.full([], NOT_FINITE, tl.int32)
            if KEEP:
                lost = differs(rounded(merged - d, DTYPE), b_w, DTYPE, RAW)
                m_lost = lost.to(tl.int32)
                inside_row = tl.cumsum(m_lost, 1)
                of_row = tl.sum(m_lost, 1)  # [TILE_N]
                before_row = tl.cumsum(of_row, 0) - of_row
                count = tl.sum(of_row, 0)
                tl.store(counts + tile, count)
                if state == DONE:
                    at = tl.atomic_add(cursor, count.to(tl.int64))
                    if at + count > capacity:
                        state = tl.full([], NO_ROOM, tl.int32)
                    else:
                        tl.store(offsets + tile, at)
                        o_e = inside_row + (before_row - 1)[:, None]
                        position = (o_n[:, None] * TILE_K + o_k[None, :]).to(PACK)
                        tl.store(pool + at + o_e, packed(position, b_w, PACK, RAW), mask=lost)
            b_m = raw_of(merged, DTYPE, RAW)
            if SUMS:
                tl.store(sums + 2 * tile, checksum(b_m))
                tl.store(sums + 2 * tile + 1, checksum(b_w))
            if state == DONE:
                tl.store(pointers(p, n, k, RAW, INNER, ALIGNED), b_m, mask=m_w)
    if UNDO:
        if (state != DONE) & (state != NOT_MERGED):
            tl.store(pointers(p, n, k, RAW, INNER, ALIGNED), found, mask=m_w)
    tl.store(states + tile, state)


@triton.jit
def _gather(positions, bits, pool, starts, offsets, counts, RAW: tl.constexpr, BLOCK: tl.constexpr):
    """A tile's part of a pool to its place in the receipt."""
    tile = tl.program_id(0).to(tl.int64)
    to, at, count = tl.load(starts + tile), tl.load(offsets + tile), tl.load(counts + tile)
    for e in range(0, count, BLOCK):
        o_e = e + tl.arange(0, BLOCK)
        m_e = o_e < count
        b_e = tl.load(pool + at + o_e, mask=m_e, other=0)
        tl.store(positions + to + o_e, (b_e >> RAW.primitive_bitwidth).to(tl.int16), mask=m_e)
        tl.store(bits + to + o_e, b_e.to(RAW), mask=m_e)


class TritonKernels:
    """These kernels, as a batch calls them."""

    tile = (TILE_N.value, TILE_K.value)

    def swap(
        self, batch: Batch, tables: Tables, wanted: int, before: tuple[Tensor, Tensor, Tensor],
        kind: Kind, how: How, *, keep: bool, pooled: bool,
    ) -> None:  # fmt: skip
        with device_of(batch.states):
            _swap[(batch.tiles,)](
                *tables[:4], batch.states, int(wanted), *before,
                batch.checksums, batch.counts, batch.offsets, batch.pool, batch.cursor,
                batch.capacity,
                DTYPE=_NAMES[kind.dtype], RAW=_NAMES[RAW[kind.dtype.itemsize]],
                PACK=_NAMES[PACK[kind.dtype.itemsize]], OLD=_NAMES[kind.old], NEW=_NAMES[kind.new],
                OLD_PRECISION=_precision(kind.old), NEW_PRECISION=_precision(kind.new),
                INNER=kind.inner, ALIGNED=kind.aligned, LORA_ALIGNED=kind.lora_aligned,
                UNDO=how.undo, MERGE=how.merge, KEEP=keep, SUMS=how.sums, POOLED=pooled,
                num_warps=8, num_stages=2,
                # What is subtracted must be what was added, to the bit.
                enable_fp_fusion=False,
            )  # fmt: skip

    def gather(
        self, positions: Tensor, bits: Tensor, pool: Tensor, starts: Tensor, offsets: Tensor,
        counts: Tensor,
    ) -> None:  # fmt: skip
        with device_of(pool):
            _gather[(counts.numel(),)](
                positions, bits, pool, starts, offsets, counts, RAW=_NAMES[bits.dtype], BLOCK=1024
            )


def _precision(lora: torch.dtype) -> str:
    """Says how factors enter tensor cores: float32 ones in three products, as accurate as one."""
    return "tf32x3" if lora == torch.float32 else "ieee"
