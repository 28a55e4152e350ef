"""What ``aot`` compiles of merging: a weight of each kind in and out, swapped, and taken back."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlora.kernels.aot.cases import ODD_K, ODD_N, ODD_R, Case, K, N, Variant
from fastlora.kernels.merge.batch import PACK, RAW, Batch, How, Job, as_read, kind_of, tiles_of
from fastlora.kernels.merge.merge import TritonKernels

_MERGE, _FOR_GOOD = Variant(puts="kept"), Variant(puts="for good")
_UNMERGE, _SWAP = Variant(takes=True), Variant(puts="kept", takes=True)


def forms(sample: bool) -> tuple[Variant, ...]:
    """What is merged, unmerged, swapped; in other layouts, of few ranks and many."""
    if sample:
        return _MERGE, _UNMERGE, _SWAP
    layouts = (Variant(puts="kept", odd=True), Variant(puts="kept", backward=True))
    layouts += (Variant(takes=True, odd=True), Variant(takes=True, puts="kept", odd=True))
    return _MERGE, _FOR_GOOD, _UNMERGE, _SWAP, *layouts, Variant(takes=True, backward=True)


def spare(case: Case) -> int:
    """Bytes of stack that a form may have: receipts want one tile, whatever the alignment.

    An unaligned element takes a pointer's registers, and what is taken out is kept until all is
    known to be right: 1.2 KiB and 184 bytes are what triton 3.6 to 3.9 need at most. A model's
    linears are aligned.
    """
    return 1280 if case.variant.odd else 200


def launch_merge(case: Case, dtype: torch.dtype, lora_dtype: torch.dtype) -> None:
    """Runs a batch of one weight as the ops do, and takes it back; nothing is ever read."""
    v = case.variant
    n, k, rank = (ODD_N, ODD_K, ODD_R) if v.odd else (N, K, v.rank)
    weight = torch.empty(k, n, dtype=dtype).T if v.backward else torch.empty(n, k, dtype=dtype)
    adapters = as_read(
        [(torch.empty(rank, k, dtype=lora_dtype), torch.empty(n, rank, dtype=lora_dtype), 1.0)]
    )
    old, new = (adapters if used else [] for used in (v.takes, v.puts))
    job = Job(0, weight, old, new, _receipt(weight) if v.takes else ())
    how = How(v.takes, bool(v.puts), v.puts != "for good")
    batch = Batch(TritonKernels(), kind_of(job), [job], how)
    batch.run()
    batch.take_back()


def launch_gather(dtype: torch.dtype) -> None:
    """Puts a receipt in order."""
    size = dtype.itemsize
    counts, places = torch.empty(9, dtype=torch.int32), torch.empty(9, dtype=torch.int64)
    positions, bits = torch.empty(99, dtype=torch.int16), torch.empty(99, dtype=RAW[size])
    pool = torch.empty(99, dtype=PACK[size])
    TritonKernels().gather(positions, bits, pool, places, places, counts)


def _receipt(weight: Tensor) -> tuple[Tensor, ...]:
    tiles, bits = tiles_of(weight, TritonKernels.tile), RAW[weight.itemsize]
    counts = torch.zeros(tiles, dtype=torch.int32)
    sums = torch.zeros(2 * tiles, dtype=torch.int64)
    return torch.empty(0, dtype=torch.int16), torch.empty(0, dtype=bits), counts, sums
