"""Workloads of multi-adapter serving: which row of a batch has which adapter.

After Chen et al., "Punica: Multi-Tenant LoRA Serving" (2023). Pure functions of their arguments,
the same on every Python and torch: the ids come from the standard library's generator.
"""

from __future__ import annotations

import random

import torch
from torch import Tensor

WORKLOADS = ("distinct", "uniform", "zipf", "identical", "skewed")
PHASES = ("decode", "prefill", "mixed")

_ZIPF_EXPONENT = 1.5
_SKEWED_SHARE = 0.8


def draw_adapter_ids(
    workload: str,
    rows: int,
    adapters: int,
    *,
    phase: str = "decode",
    sequences: int = 1,
    without: float = 0.0,
    seed: int = 0,
) -> Tensor:
    """Draws ids (rows,) int64 in [0, adapters), and -1 for a share ``without`` of the requests.

    workload, over the requests of the batch:
      distinct   no two share an adapter while there are enough of them
      uniform    every adapter equally likely
      zipf       the k-th most popular adapter with weight k ** -1.5
      identical  all have the same one
      skewed     four in five have the same one, the others any
    phase: ``decode``, a request is one row; ``prefill``, the rows are ``sequences`` requests in
    turn; ``mixed``, half of the rows are prefill, then decode.
    """
    if workload not in WORKLOADS:
        raise ValueError(f"workload: expected one of {', '.join(WORKLOADS)}, got {workload!r}")
    lengths = count_request_rows(phase, rows, sequences)
    draw = random.Random(f"{workload} {rows} {adapters} {phase} {sequences} {seed}")
    ids = _draw_requests(workload, len(lengths), adapters, draw)
    ids = [-1 if draw.random() < without else i for i in ids]
    return torch.tensor(ids, dtype=torch.int64).repeat_interleave(torch.tensor(lengths))


def count_request_rows(phase: str, rows: int, sequences: int = 1) -> list[int]:
    """Counts the rows of each request, in batch order."""
    if phase == "decode":
        return [1] * rows
    if phase == "prefill":
        return [rows // sequences + (i < rows % sequences) for i in range(sequences)]
    if phase == "mixed":
        prefill = rows // 2
        return [*count_request_rows("prefill", prefill, sequences), *[1] * (rows - prefill)]
    raise ValueError(f"phase: expected one of {', '.join(PHASES)}, got {phase!r}")


def _draw_requests(workload: str, count: int, adapters: int, draw: random.Random) -> list[int]:
    popularity = draw.sample(range(adapters), adapters)
    if workload == "distinct":
        return [popularity[i % adapters] for i in range(count)]
    weights = {
        "uniform": [1.0] * adapters,
        "zipf": [(k + 1) ** -_ZIPF_EXPONENT for k in range(adapters)],
        "identical": [1.0] + [0.0] * (adapters - 1),
        "skewed": [_SKEWED_SHARE] + [(1 - _SKEWED_SHARE) / max(1, adapters - 1)] * (adapters - 1),
    }
    return draw.choices(popularity, weights[workload], k=count)
