"""vLLM's and SGLang's kernels for many adapters, each as its server calls them.

Both shrink and expand in a launch each, after torch's base product. What they prepare once a step
or when an adapter is loaded is prepared beforehand. Held to the gate on a CPU, their Triton kernels
interpreted in fp16: vLLM 0.33.0, SGLang 0.5.23. Neither has run on a GPU.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as nnf

from benchmarks.harness.case import Absent, Call, Case, Operands, Outputs
from benchmarks.peers.calls import importing

# Rows of one adapter that a program of SGLang takes: its --max-lora-chunk-size by default.
_CHUNK = 16


def prepare_vllm(case: Case, o: Operands) -> Call:
    """Prepares vLLM's ``lora_shrink`` and ``lora_expand``.

    As vLLM has them, scalings are multiplied into lora_B, and every slot has the largest rank.
    """
    _check_half_precision(case, "vllm")
    with importing("vllm"):
        from vllm.lora.ops.triton_ops import LoRAKernelMeta, lora_expand, lora_shrink

    x, weight, ids = _list_rows(o)
    T, (S, R, _) = x.shape[0], o["lora_A"].shape
    meta = LoRAKernelMeta.make(max_loras=S, max_num_tokens=T, device=x.device)
    meta.prepare_tensors(ids)
    known = meta.meta_args(T, specialize_active_lora=True)
    lora_A = o["lora_A"].to(x.dtype)
    lora_B = (o["lora_B"].float() * o["scalings"][:, None, None]).to(x.dtype)

    def call() -> Outputs:
        y = nnf.linear(x, weight)
        h = torch.empty((1, T, R), dtype=torch.float32, device=x.device)
        lora_shrink(x, [lora_A], h, *known, 1.0)
        lora_expand(h, [lora_B], y, *known, add_inputs=True)
        return {"y": y}

    return call


def prepare_sglang(case: Case, o: Operands) -> Call:
    """Prepares SGLang's default backend, ``csgmv``: chunks of rows with the same adapter."""
    _check_half_precision(case, "sglang")
    with importing("sglang"):
        from sglang.kernels.ops.lora.dense.chunked_sgmv_expand import (
            chunked_sgmv_lora_expand_forward as expand,
        )
        from sglang.kernels.ops.lora.dense.chunked_sgmv_shrink import (
            chunked_sgmv_lora_shrink_forward as shrink,
        )
        from sglang.srt.lora.utils import LoRABatchInfo

    x, weight, ids = _list_rows(o)
    N, S, device = weight.shape[0], o["lora_A"].shape[0], x.device
    # Rows without an adapter get one of rank 0, whose weights are not read.
    chunks = _make_chunks(torch.where(ids < 0, S, ids).tolist())
    known = LoRABatchInfo(
        use_cuda_graph=False,
        bs=ids.numel(),
        num_segments=len(chunks.adapters),
        seg_indptr=torch.tensor(chunks.starts, dtype=torch.int32, device=device),
        weight_indices=torch.tensor(chunks.adapters, dtype=torch.int32, device=device),
        lora_ranks=nnf.pad(o["ranks"], (0, 1)).int(),
        scalings=nnf.pad(o["scalings"], (0, 1)),
        max_len=_CHUNK,
        seg_lens=None,
        permutation=torch.tensor(chunks.rows, dtype=torch.int32, device=device),
    )
    lora_A, lora_B = (o[name].to(x.dtype) for name in ("lora_A", "lora_B"))
    ends = torch.tensor([0, N], dtype=torch.int32)
    device_ends = ends.to(device)

    def call() -> Outputs:
        y = nnf.linear(x, weight)
        h = shrink(x, lora_A, known, num_slices=1)
        expand(
            h,
            lora_B,
            known,
            slice_offsets=device_ends,
            max_slice_size=N,
            base_output=y,
            slice_offsets_cpu=ends,
        )
        return {"y": y}

    return call


def _check_half_precision(case: Case, library: str) -> None:
    if case.dtype not in ("bf16", "fp16"):
        raise Absent(f"{library} serves bf16 and fp16, not {case.dtype}")


class _Chunks(NamedTuple):
    """adapters: of each chunk. starts: in ``rows``, one more than chunks. rows: by adapter."""

    adapters: list[int]
    starts: list[int]
    rows: list[int]


def _make_chunks(of_row: list[int]) -> _Chunks:
    """Sorts rows by adapter and cuts them into chunks of one adapter, ``_CHUNK`` rows at most."""
    rows = sorted(range(len(of_row)), key=lambda row: of_row[row])
    adapters, starts = [], []
    for number, row in enumerate(rows):
        adapter = of_row[row]
        if not adapters or adapters[-1] != adapter or number - starts[-1] == _CHUNK:
            adapters.append(adapter)
            starts.append(number)
    return _Chunks(adapters, [*starts, len(rows)], rows)


def _list_rows(o: Operands) -> tuple[Tensor, Tensor, Tensor]:
    """Returns x as rows (T, K), the weight, and an id for each row, int32 (T,)."""
    x = o["x"].flatten(0, -2)
    ids = o["ids"].repeat_interleave(x.shape[0] // o["ids"].numel())
    return x, o["weight"], ids.int()
