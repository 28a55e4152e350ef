"""Merging into a weight so that every bit can be had back, in plain torch.

``M = round(W + d)`` with ``d = sum of scaling * B @ A`` in float32 (float64 for a float64 weight).
Given the same d again, ``round(M - d)`` is W except where W + d crossed a binade; the receipt keeps
just those elements (position in their tile, raw bits) and checksums of M and W.

d must have the same bits every time, so it is summed rank by rank with separate multiplications
and additions, each rounded once by IEEE 754: no library GEMM, whose bits depend on alignment and
thread count, and no contraction. The price is 2 R passes over a tile that stays in cache. A tile is
at most 65536 elements, so that a position fits 16 bits; beside the tile nothing of the weight's
size is held.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

# Named in every receipt: a receipt of another arithmetic is refused.
KERNEL = "torch-ieee-1"
TILE = 1 << 16
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}

Tile = tuple[slice, slice]


def merge_(
    weight: Tensor, lora_A: Sequence[Tensor], lora_B: Sequence[Tensor], scalings: Sequence[float]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Adds the adapters to weight (N, K) in place; returns (positions, bits, counts, checksums).

    A tile is checked before it is stored: a sum that is not finite where the weight was, or an
    interruption, restores the tiles already written and raises.
    """
    adapters = list(zip(lora_A, lora_B, scalings, strict=True))
    positions: list[Tensor] = []
    bits: list[Tensor] = []
    sums: list[Tensor] = []
    done: list[Tile] = []
    try:
        for tile in _tiles(weight):
            before = weight[tile]
            delta = _delta(weight, tile, adapters)
            merged = _merged(before, delta)
            if not bool((merged.isfinite() | ~before.isfinite()).all()):
                raise ValueError(
                    f"adapters: merging gives values that are not finite in rows {tile[0].start} to "
                    f"{tile[0].stop - 1} of the weight; the weight is unchanged"
                )
            back = _subtract(merged, delta)
            old = _as_bits(before)
            changed = (_as_bits(back) != old).flatten().nonzero().flatten()
            bits.append(old.flatten()[changed])
            positions.append(changed.to(torch.uint16))
            sums.append(torch.stack((_checksum(_as_bits(merged)), _checksum(old))))
            done.append(tile)
            before.copy_(merged)
    except BaseException:
        for tile, where, old, both in zip(done, positions, bits, sums, strict=False):
            # The last tile may have been noted but not yet written.
            if _checksum(_as_bits(weight[tile])) == both[0]:
                weight[tile] = _restored(weight, tile, adapters, where, old)
        raise
    counts = torch.tensor([len(p) for p in positions], dtype=torch.int32)
    nothing = weight.new_empty(0, dtype=torch.uint16)
    no_bits = _as_bits(weight.new_empty(0))
    return (
        torch.cat([nothing, *positions]),
        torch.cat([no_bits, *bits]),
        counts,
        _combine(sums, weight),
    )


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
    """Gives weight (N, K) every bit back that it had before ``merge_``, or raises and changes nothing."""
    adapters = list(zip(lora_A, lora_B, scalings, strict=True))
    sizes = counts.tolist()
    parts = list(zip(_tiles(weight), positions.split(sizes), bits.split(sizes), strict=True))
    sums = []
    for tile, where, old in parts:
        restored = _restored(weight, tile, adapters, where, old)
        merged = _checksum(_as_bits(weight[tile]))
        sums.append(torch.stack((merged, _checksum(_as_bits(restored)))))
    found, expected = _combine(sums, weight).tolist(), checksums.tolist()
    if found[0] != expected[0]:
        raise RuntimeError(
            "weight: it is not the one that this receipt's merge left behind (edited since, or another "
            "layer's); nothing was changed"
        )
    if found[1] != expected[1]:
        raise RuntimeError(
            "receipt: it does not give back the original weight here (its adapters were edited, or this "
            "machine's arithmetic differs); nothing was changed"
        )
    done: list[Tile] = []
    try:
        for tile, where, old in parts:
            restored = _restored(weight, tile, adapters, where, old)
            done.append(tile)
            weight[tile] = restored
    except BaseException:
        for tile, both in zip(done, sums, strict=False):
            if _checksum(_as_bits(weight[tile])) == both[1]:
                weight[tile] = _merged(weight[tile], _delta(weight, tile, adapters))
        raise


def _tiles(weight: Tensor) -> Iterator[Tile]:
    N, K = weight.shape
    width = min(K, TILE)
    height = max(1, TILE // max(1, width))
    for n in range(0, N if K else 0, height):
        for k in range(0, K, width):
            yield slice(n, min(n + height, N)), slice(k, min(k + width, K))


def _delta(weight: Tensor, tile: Tile, adapters: Sequence[tuple[Tensor, Tensor, float]]) -> Tensor:
    """d of one tile, the same bits on every call, thread count and machine."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    shape = (tile[0].stop - tile[0].start, tile[1].stop - tile[1].start)
    delta = weight.new_zeros(shape, dtype=wide)
    product = torch.empty_like(delta)
    for lora_A, lora_B, scaling in adapters:
        A = lora_A[:, tile[1]].to(wide)  # [R, tile K]
        B = lora_B[tile[0]].to(wide) * scaling  # [tile N, R]
        for r in range(A.shape[0]):
            torch.mul(B[:, r, None], A[r], out=product)
            delta.add_(product)
    return delta


def _merged(before: Tensor, delta: Tensor) -> Tensor:
    return delta.add(before).to(before.dtype)


def _subtract(merged: Tensor, delta: Tensor) -> Tensor:
    # A contiguous copy whatever merged's strides and dtype are.
    return torch.empty_like(delta).copy_(merged).sub_(delta).to(merged.dtype)


def _restored(
    weight: Tensor,
    tile: Tile,
    adapters: Sequence[tuple[Tensor, Tensor, float]],
    where: Tensor,
    old: Tensor,
) -> Tensor:
    back = _subtract(weight[tile], _delta(weight, tile, adapters))
    _as_bits(back).view(-1)[where.to(torch.int64)] = old
    return back


def _as_bits(values: Tensor) -> Tensor:
    return values.contiguous().view(_BITS[values.element_size()])


def _checksum(bits: Tensor) -> Tensor:
    """A sum modulo 2**64 with odd weights: any one changed or two swapped elements change it."""
    if bits.dtype == torch.int64:
        # Swaps of values that differ in their high bits alone would cancel: float64's 1.0 and -1.0.
        bits = bits ^ ((bits >> 32) & 0xFFFFFFFF)
    weights = torch.arange(1, 2 * bits.numel(), 2, device=bits.device)
    return (bits.flatten().to(torch.int64) * weights).sum()


def _combine(sums: list[Tensor], weight: Tensor) -> Tensor:
    """Checksums (2,) int64 of merged and original weight from those of their tiles."""
    if not sums:
        return torch.zeros(2, dtype=torch.int64, device=weight.device)
    weights = torch.arange(1, 2 * len(sums), 2, device=weight.device)
    return (torch.stack(sums) * weights[:, None]).sum(0)
