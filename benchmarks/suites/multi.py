"""Suite ``multi``: many adapters in one batch, as a server decodes or prefills."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as nnf

from benchmarks.harness.case import (
    BASE,
    Absent,
    Call,
    Case,
    Operands,
    Outputs,
    Work,
    spread_indices,
    widen,
)
from benchmarks.harness.oracle import oracle
from benchmarks.peers.calls import try_call
from benchmarks.peers.compiling import compile_call, compile_whole
from benchmarks.peers.peft import make_peft_linear
from benchmarks.peers.serving import prepare_sglang, prepare_vllm
from benchmarks.suites.paths import run_along, run_on
from benchmarks.suites.workloads import draw_adapter_ids
from fastlora import functional as F

_MIXED_SEQUENCES = 4
_PAGE = 8
# Of the Triton kernels; kernels/choose/ledger.py has the list, but importing it needs triton.
# "library" is how others serve: the library's product, then a launch to shrink and one to expand.
PATHS = ("decode", "decode_beside", "prefill", "prefill_beside", "library")
# Ranks of slots in turn where they are mixed, at most R.
_RANKS = (8, 16, 32, 64, 128)


class Multi(Work):
    """Rows of x, each through the base and its own adapter.

    What a server computes once a step (which rows belong together) is prepared outside the timed
    call for every provider. decode: x (T, K), ids (T,), a row is a request. prefill:
    x (B, L, K), ids (B,). mixed: x (T, K), ids (T,), half of the rows prefill, half decode.
    """

    suite, op = "multi", "multi_lora_linear"

    def __init__(self, phase: str) -> None:
        self.phase = phase
        self.name = f"multi-{phase}"
        self.providers = {
            BASE: _prepare_base,
            "torch": _prepare_torch,
            "peft": _prepare_peft,
            "fastlora": _prepare_fastlora,
        }
        self.providers["fastlora-pages"] = _prepare_fastlora_pages
        if phase != "mixed":
            # Copies an adapter for every row or sequence: of use while they are few.
            self.providers["torch-gather"] = _prepare_torch_gather
        self.compiled_providers = {
            f"{name}-compiled": partial(compile_call, compile_whole(self.providers[name]))
            for name in ("torch", "torch-gather", "peft", "fastlora")
            if name in self.providers
        }
        self.gpu_providers = {path: partial(run_along, path, _prepare_fastlora) for path in PATHS}
        self.gpu_providers["cuda"] = partial(run_on, "cuda", _prepare_fastlora)
        self.gpu_providers["merged"] = _prepare_merged
        self.gpu_providers["vllm"] = partial(try_call, "vllm", prepare_vllm)
        self.gpu_providers["sglang"] = partial(try_call, "sglang", prepare_sglang)

    def operands(self, case: Case, seed: int) -> Operands:
        K, N, R, S = (case.shape[k] for k in "KNRS")
        draw = torch.Generator().manual_seed(seed)
        ids = self._row_ids(case, seed)
        if self.phase == "prefill":
            x = case.tensor(draw, case.shape["B"], case.shape["L"], K)
            ids = ids[:: case.shape["L"]]
        else:
            x = case.tensor(draw, case.shape["T"], K)
        weight = case.tensor(draw, N, K, scale=K**-0.5)
        # Deltas of different adapters differ by about half of the output.
        lora_A = case.adapter(draw, S, R, K, scale=K**-0.5)
        lora_B = case.adapter(draw, S, N, R, scale=0.5 * R**-0.5)
        ranks = torch.tensor(_list_ranks(case), device=case.device)
        for slot, r in enumerate(ranks.tolist()):
            # Zero past the rank: right too for providers of a single rank.
            lora_A[slot, r:] = 0
            lora_B[slot, :, r:] = 0
        return {
            "x": x,
            "weight": weight,
            "lora_A": lora_A,
            "lora_B": lora_B,
            "ids": ids.to(case.device),
            "ranks": ranks,
            "scalings": torch.linspace(0.75, 1.25, S, device=case.device),
        }

    def _row_ids(self, case: Case, seed: int) -> Tensor:
        sequences = case.shape.get("B", _MIXED_SEQUENCES)
        return draw_adapter_ids(
            case.workload,
            _count_rows(case),
            case.shape["S"],
            phase=self.phase,
            sequences=sequences,
            seed=seed,
        )

    def expected(self, case: Case, operands: Operands, provider: str) -> Outputs:
        rows = spread_indices(_count_rows(case))
        o = {name: widen(t) for name, t in operands.items() if name not in ("ids", "ranks")}
        ids = operands["ids"].cpu()
        if self.phase == "prefill":
            ids = ids.repeat_interleave(case.shape["L"])
        ids = torch.full_like(ids, -1) if provider == BASE else ids
        x = o["x"].flatten(0, -2)[rows]
        y = oracle.multi_lora_linear(
            x, o["weight"], o["lora_A"], o["lora_B"], ids[rows], o["scalings"]
        )
        return {"y": y}

    def sample(self, case: Case, outputs: Outputs) -> Outputs:
        return {"y": outputs["y"].detach().flatten(0, -2).cpu()[spread_indices(_count_rows(case))]}

    def cost(self, case: Case, provider: str) -> tuple[int, int]:
        T, (K, N) = _count_rows(case), (case.shape[k] for k in "KN")
        size, lora_size = case.element_sizes
        flops, moved = 2 * T * K * N, size * (K * N + T * (K + N))
        if provider != BASE:
            ids, ranks = self._row_ids(case, 0), torch.tensor([*_list_ranks(case), 0])
            flops += 2 * int(ranks[ids].sum()) * (K + N)
            moved += lora_size * int(ranks[ids.unique()].sum()) * (K + N)
        return flops, moved


def _count_rows(case: Case) -> int:
    return case.shape["T"] if "T" in case.shape else case.shape["B"] * case.shape["L"]


def _list_ranks(case: Case) -> list[int]:
    """Lists the rank of each slot."""
    S, R = case.shape["S"], case.shape["R"]
    return [min(R, _RANKS[slot % len(_RANKS)]) if case.ranks else R for slot in range(S)]


def _prepare_base(case: Case, o: Operands) -> Call:
    return lambda: {"y": nnf.linear(o["x"], o["weight"])}


def _prepare_torch(case: Case, o: Operands) -> Call:
    """Prepares a loop over the adapters present, their rows known beforehand."""
    x, ids = o["x"], o["ids"]
    T, N = x.shape[:-1].numel(), o["weight"].shape[0]
    of_row = ids.repeat_interleave(T // ids.numel())
    ranks = o["ranks"].tolist()
    groups = [
        (slot, ranks[slot], (of_row == slot).nonzero().flatten(), float(o["scalings"][slot]))
        for slot in of_row.unique().tolist()
        if slot >= 0
    ]

    def call() -> Outputs:
        y = nnf.linear(x, o["weight"])
        rows_x, rows_y = x.view(T, -1), y.view(T, N)
        for slot, r, rows, scaling in groups:
            lora_A, lora_B = o["lora_A"][slot, :r].to(x.dtype), o["lora_B"][slot, :, :r].to(x.dtype)
            rows_y.index_add_(0, rows, (rows_x[rows] @ lora_A.T) @ lora_B.T, alpha=scaling)
        return {"y": y}

    return call


def _prepare_torch_gather(case: Case, o: Operands) -> Call:
    """Prepares two batched products with the adapter of every row or sequence gathered."""
    x, ids = o["x"], o["ids"]
    rows = x[:, None] if x.dim() == 2 else x  # [B, L, K]
    slots, none = ids.clamp(min=0), (ids < 0)[:, None, None]
    scale = o["scalings"].to(x.dtype)[slots, None, None].masked_fill(none, 0)

    def call() -> Outputs:
        y = nnf.linear(x, o["weight"])
        h = torch.bmm(rows, o["lora_A"][slots].to(x.dtype).mT) * scale
        y.view(*rows.shape[:2], -1).baddbmm_(h, o["lora_B"][slots].to(x.dtype).mT)
        return {"y": y}

    return call


def _prepare_peft(case: Case, o: Operands) -> Call:
    layer, names = make_peft_mixed(o)
    return lambda: {"y": layer(o["x"], adapter_names=names)}


def make_peft_mixed(o: Operands) -> tuple[Any, list[str]]:
    """Makes PEFT's layer and the ``adapter_names`` of its mixed batch."""
    slots = enumerate(zip(o["ranks"].tolist(), o["scalings"].tolist(), strict=True))
    parts = [(o["lora_A"][i, :r], o["lora_B"][i, :, :r], scaling) for i, (r, scaling) in slots]
    names = ["__base__" if i < 0 else str(i) for i in o["ids"].tolist()]
    return make_peft_linear(o["weight"], parts), names


def _prepare_fastlora(case: Case, o: Operands) -> Call:
    groups = F.group_rows(o["ids"], case.shape["S"])
    args = (o["x"], o["weight"], o["lora_A"], o["lora_B"], groups, o["scalings"])
    ranks = o["ranks"] if case.ranks else None
    return lambda: {"y": F.multi_lora_linear(*args, ranks=ranks)}


def _prepare_fastlora_pages(case: Case, o: Operands) -> Call:
    """Prepares the same adapters as a bank has them: in pages of eight ranks, B's rank-major."""
    groups, (S, R, _) = F.group_rows(o["ids"], case.shape["S"]), o["lora_A"].shape
    pages = -(-R // _PAGE)
    lora_A, lora_B = (
        nnf.pad(t, (0, 0, 0, pages * _PAGE - R)).reshape(S * pages, _PAGE, -1)
        for t in (o["lora_A"], o["lora_B"].mT)
    )
    table = torch.arange(S * pages, dtype=torch.int32, device=case.device).view(S, pages)
    args = (o["x"], o["weight"], lora_A, lora_B, groups, o["scalings"])
    return lambda: {"y": F.multi_lora_linear(*args, ranks=o["ranks"], page_table=table)}


def _prepare_merged(case: Case, o: Operands) -> Call:
    """Prepares a weight with the only adapter of all rows merged."""
    if case.shape["S"] > 1:
        raise Absent("a weight has one adapter merged at a time")
    r, scaling = int(o["ranks"][0]), float(o["scalings"][0])
    delta = scaling * o["lora_B"][0, :, :r].float() @ o["lora_A"][0, :r].float()
    weight = (o["weight"].float() + delta).to(o["weight"].dtype)
    return lambda: {"y": nnf.linear(o["x"], weight)}
