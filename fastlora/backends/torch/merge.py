"""Merging into a weight so that every bit can be had back, in plain torch.

``M = round(W + d)`` with ``d = sum of scaling * B @ A`` in float32 (float64 for a float64 weight).
Given the same d again, ``round(M - d)`` is W except where W + d crossed a binade; the receipt keeps
just those elements (position in their tile, raw bits) and checksums of M and W.

d has the same bits every time (``fastlora/backends/torch/delta.py``). A tile is at most 65536
elements, so that a position fits 16 bits; beside the tile nothing of the weight's size is held.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as nnf

from fastlora.backends.dtypes import BITS
from fastlora.backends.merge_lists import errors
from fastlora.backends.merge_lists.one_by_one import OneByOne
from fastlora.backends.torch.delta import Delta, Tile

TILE = 1 << 16
NOT_RESTORED = (
    "receipt: it does not give back the original weight here (its adapters were edited, or "
    "this machine's arithmetic differs); nothing was changed"
)


def merge_kernel(device: torch.device) -> str:
    """Named in every receipt: one of another arithmetic is refused."""
    return "torch-exact-1"


def merge_one_(
    weight: Tensor,
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    scalings: Sequence[float],
    receipt: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Adds the adapters to weight (N, K) in place; returns (positions, bits, counts, checksums).

    Without ``receipt`` they are kept until the last tile is written, and not returned.
    A tile is checked before it is stored: a sum that is not finite where the weight was, or an
    interruption, restores the tiles already written and raises.
    """
    delta_of = Delta(weight, lora_A, lora_B, scalings)
    positions: list[Tensor] = []
    bits: list[Tensor] = []
    sums: list[Tensor] = []
    done: list[Tile] = []
    try:
        for tile in tiles(weight):
            before = weight[tile]
            delta = delta_of(tile)
            merged = _merged(before, delta)
            if not _finite_where(before, merged):
                raise ValueError(
                    f"adapters: merging gives values that are not finite in rows {tile[0].start} "
                    f"to {tile[0].stop - 1} of the weight; the weight is unchanged"
                )
            back = _subtract(merged, delta)
            old = _as_bits(before)
            changed = (_as_bits(back) != old).flatten().nonzero().flatten()
            bits.append(old.flatten()[changed])
            positions.append(changed.to(torch.uint16).view(torch.int16))
            sums.append(torch.stack((_checksum(merged), _checksum(before))))
            done.append(tile)
            before.copy_(merged)
        if not receipt:
            return nothing(weight)
        counts = torch.tensor([len(p) for p in positions], dtype=torch.int32, device="cpu")
        no_positions, no_bits, *_ = nothing(weight)
        return (
            torch.cat([no_positions, *positions]),
            torch.cat([no_bits, *bits]),
            counts,
            _combine(sums, weight),
        )
    except BaseException:
        for tile, where, old, both in zip(done, positions, bits, sums, strict=False):
            # The last tile may have been noted but not yet written.
            if _checksum(weight[tile]) == both[0]:
                weight[tile] = _restored(weight[tile], delta_of(tile), where, old)
        raise


def nothing(weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The parts of a receipt, empty."""
    return (
        weight.new_empty(0, dtype=torch.int16),
        weight.new_empty(0, dtype=BITS[weight.itemsize]),
        torch.empty(0, dtype=torch.int32, device="cpu"),
        weight.new_zeros(2, dtype=torch.int64),
    )


def check_parts(
    weight: Tensor, positions: Tensor, bits: Tensor, counts: Tensor, checksums: Tensor
) -> None:
    """RuntimeError unless a receipt's parts have the dtypes and lengths of the weight's."""
    parts = (positions, bits, counts, checksums)
    dtypes = (torch.int16, BITS[weight.itemsize], torch.int32, torch.int64)
    held = int(counts.sum())
    lengths = (held, held, sum(1 for _ in tiles(weight)), 2)
    fits = all(t.dtype == d for t, d in zip(parts, dtypes, strict=True))
    fits = fits and all(t.numel() == n for t, n in zip(parts, lengths, strict=True))
    if not fits or bool((counts < 0).any()):
        raise RuntimeError(NOT_RESTORED)


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
    check_parts(weight, positions, bits, counts, checksums)
    sizes = counts.tolist()
    delta_of = Delta(weight, lora_A, lora_B, scalings)
    parts = list(zip(tiles(weight), positions.split(sizes), bits.split(sizes), strict=True))
    sums = []
    for tile, where, old in parts:
        restored = _restored(weight[tile], delta_of(tile), where, old)
        merged = _checksum(weight[tile])
        sums.append(torch.stack((merged, _checksum(restored))))
    found, expected = _combine(sums, weight).tolist(), checksums.tolist()
    if found[0] != expected[0]:
        raise RuntimeError(errors.NOT_MERGED)
    if found[1] != expected[1]:
        raise RuntimeError(NOT_RESTORED)
    done: list[Tile] = []
    try:
        for tile, where, old in parts:
            restored = _restored(weight[tile], delta_of(tile), where, old)
            done.append(tile)
            weight[tile] = restored
    except BaseException:
        for tile, both in zip(done, sums, strict=False):
            if _checksum(weight[tile]) == both[1]:
                weight[tile] = _merged(weight[tile], delta_of(tile))
        raise


_ops = OneByOne(merge_one_, unmerge_one_)
merge_, unmerge_, swap_ = _ops.merge_, _ops.unmerge_, _ops.swap_


def tiles(weight: Tensor) -> Iterator[Tile]:
    """Whole rows, or parts of one: at most TILE elements each."""
    N, K = weight.shape
    width = min(K, TILE)
    height = max(1, TILE // max(1, width))
    for n in range(0, N if K else 0, height):
        for k in range(0, K, width):
            yield slice(n, min(n + height, N)), slice(k, min(k + width, K))


def _merged(before: Tensor, delta: Tensor) -> Tensor:
    return delta.add(before).to(before.dtype)


def _subtract(merged: Tensor, delta: Tensor) -> Tensor:
    # A contiguous copy whatever merged's strides and dtype are.
    return torch.empty_like(delta).copy_(merged).sub_(delta).to(merged.dtype)


def _restored(merged: Tensor, delta: Tensor, where: Tensor, old: Tensor) -> Tensor:
    back = _subtract(merged, delta)
    places = where.to(torch.int64) & 0xFFFF
    if places.numel() and int(places.max()) >= back.numel():
        raise RuntimeError(NOT_RESTORED)
    _as_bits(back).view(-1)[places] = old
    return back


def _as_bits(values: Tensor) -> Tensor:
    return values.contiguous().view(BITS[values.element_size()])


def _finite_where(before: Tensor, merged: Tensor) -> bool:
    """Whether merged is finite wherever before was."""
    if not merged.numel() or all(bound.isfinite() for bound in merged.aminmax()):
        return True
    return bool((merged.isfinite() | ~before.isfinite()).all())


def _checksum(values: Tensor) -> Tensor:
    """A sum modulo 2**64 over 8-byte words: any one changed or two swapped elements change it."""
    raw = _as_bits(values).view(-1)
    words = nnf.pad(raw, (0, -raw.numel() % (8 // raw.element_size()))).view(torch.int64)
    # Without this, what swaps change in a word's high bits alone would be shifted out: signs, say.
    words = words * -0x61C8864680B583EB
    words = words ^ ((words >> 31) & 0x1FFFFFFFF)
    return (words * _odd_numbers(words.numel(), words.device)).sum()


@functools.lru_cache(maxsize=4)
def _odd_numbers(count: int, device: torch.device) -> Tensor:
    return torch.arange(1, 2 * count, 2, device=device)


def checksum(weight: Tensor) -> Tensor:
    """Of a whole weight (N, K) of any strides, int64 () on its device."""
    sums = [_checksum(weight[tile]).expand(2) for tile in tiles(weight)]
    return _combine(sums, weight)[0]


def _combine(sums: list[Tensor], weight: Tensor) -> Tensor:
    """Checksums (2,) int64 of merged and original weight from those of their tiles."""
    if not sums:
        return torch.zeros(2, dtype=torch.int64, device=weight.device)
    weights = torch.arange(1, 2 * len(sums), 2, device=weight.device)
    return (torch.stack(sums) * weights[:, None]).sum(0)
