"""Suite ``merge``: an adapter into its weight, in place, out again, and one for another."""

from __future__ import annotations

from copy import copy
from dataclasses import replace
from functools import partial

import torch

from benchmarks.harness.case import BASE, Call, Case, Operands, Outputs, Work, spread_indices, widen
from benchmarks.harness.oracle import oracle
from benchmarks.peers.peft import make_peft_linear
from benchmarks.suites.paths import run_on
from fastlora import functional as F
from fastlora.functional.receipt import Adapter

SCALING = 2.0
# The adapter's part beside the weight: that of a strong fine-tune; and for the gate, where
# an adapter a tenth too small would not show beside bfloat16's rounding of the weight.
_SHARE, _GATED_SHARE = 0.05, 0.5


class _OfWeights(Work):
    """Work on a weight and an adapter of ``share`` of it; the gate compares a stronger one."""

    suite = "merge"
    share = _SHARE

    def gated(self, case: Case) -> Case:
        stronger = copy(self)
        stronger.share = _GATED_SHARE
        return replace(case, work=stronger)


class Swap(_OfWeights):
    """One adapter out of the weight and another in, again and again.

    The base is a copy of the weight: the bytes that cannot be avoided. fastlora's weight holds what
    merging the other adapter alone would give, to the bit; the others add and subtract.
    """

    name, op = "swap", "swap_"

    def __init__(self) -> None:
        self.providers = {
            BASE: self._base,
            "torch": self._torch,
            "peft": self._peft,
            "fastlora": self._fastlora,
        }
        self.gpu_providers = {b: partial(run_on, b, self._fastlora) for b in ("triton", "cuda")}

    def operands(self, case: Case, seed: int) -> Operands:
        N, K, R = (case.shape[k] for k in "NKR")
        draw = torch.Generator().manual_seed(seed)
        scale = self.share / SCALING * R**-0.5
        return {
            "weight": case.tensor(draw, N, K, scale=K**-0.5),
            "lora_A": case.adapter(draw, R, K, scale=K**-0.5),
            "lora_B": case.adapter(draw, N, R, scale=scale),
            "other_A": case.adapter(draw, R, K, scale=K**-0.5),
            "other_B": case.adapter(draw, N, R, scale=scale),
        }

    def _base(self, case: Case, o: Operands) -> Call:
        weight, other = o["weight"], torch.empty_like(o["weight"])

        def call() -> Outputs:
            other.copy_(weight)
            return {"merged": other}

        return call

    def _torch(self, case: Case, o: Operands) -> Call:
        weight, (mine, other) = o["weight"], _list_both(o)

        def add(adapter: Adapter, sign: int) -> None:
            A, B, scaling = adapter
            weight.addmm_(B.to(weight.dtype), A.to(weight.dtype), alpha=sign * scaling)

        def call() -> Outputs:
            nonlocal mine, other
            add(mine, -1)
            add(other, 1)
            mine, other = other, mine
            return {"merged": weight}

        add(mine, 1)
        return call

    def _peft(self, case: Case, o: Operands) -> Call:
        layer = make_peft_linear(o["weight"], _list_both(o))
        weight, names = layer.get_base_layer().weight, list(layer.lora_A)
        layer.merge(adapter_names=names[:1])

        def call() -> Outputs:
            layer.unmerge()
            names.reverse()
            layer.merge(adapter_names=names[:1])
            return {"merged": weight}

        return call

    def _fastlora(self, case: Case, o: Operands) -> Call:
        weight, (mine, other) = o["weight"], _list_both(o)
        receipt = F.merge_(weight, [mine])

        def call() -> Outputs:
            nonlocal mine, other, receipt
            receipt = F.swap_(weight, receipt, [other])
            mine, other = other, mine
            return {"merged": weight}

        return call

    def expected(self, case: Case, operands: Operands, provider: str) -> Outputs:
        weight, other_A, other_B = (widen(operands[k]) for k in ("weight", "other_A", "other_B"))
        rows = spread_indices(case.shape["N"])
        adapters = [] if provider == BASE else [(other_A, other_B[rows], SCALING)]
        return {"merged": oracle.merge(weight[rows], adapters)}

    def sample(self, case: Case, outputs: Outputs) -> Outputs:
        rows = spread_indices(case.shape["N"])
        return {name: t.detach().cpu()[rows] for name, t in outputs.items()}

    def cost(self, case: Case, provider: str) -> tuple[int, int]:
        N, K, R = (case.shape[k] for k in "NKR")
        size, lora_size = case.element_sizes
        adapters = 0 if provider == BASE else 2
        return 2 * adapters * N * K * R, 2 * size * N * K + lora_size * adapters * R * (K + N)


def _list_both(o: Operands) -> list[Adapter]:
    return [(o["lora_A"], o["lora_B"], SCALING), (o["other_A"], o["other_B"], SCALING)]


class Merge(_OfWeights):
    """``weight += SCALING * lora_B @ lora_A``; with ``unmerge``, and back again.

    The base is a copy of the weight (there and back): the bytes that cannot be avoided. Where the
    merge is undone fastlora writes a receipt and gives back every bit; the others subtract. A
    weight that is timed keeps what earlier calls merged, which changes nothing in the time.
    """

    op = "merge_"

    def __init__(self, *, unmerge: bool) -> None:
        self.unmerge = unmerge
        self.name = "merge-unmerge" if unmerge else "merge"
        self.providers = {
            BASE: self._base,
            "torch": self._torch,
            "peft": self._peft,
            "fastlora": self._fastlora,
        }
        self.gpu_providers = {b: partial(run_on, b, self._fastlora) for b in ("triton", "cuda")}
        if not unmerge:
            self.providers["torch-split"] = self._torch_split

    def operands(self, case: Case, seed: int) -> Operands:
        N, K, R = (case.shape[k] for k in "NKR")
        draw = torch.Generator().manual_seed(seed)
        return {
            "weight": case.tensor(draw, N, K, scale=K**-0.5),
            "lora_A": case.adapter(draw, R, K, scale=K**-0.5),
            "lora_B": case.adapter(draw, N, R, scale=self.share / SCALING * R**-0.5),
        }

    def _base(self, case: Case, o: Operands) -> Call:
        weight, other = o["weight"], torch.empty_like(o["weight"])

        def call() -> Outputs:
            other.copy_(weight)
            if not self.unmerge:
                return {"merged": other}
            seen = self._copy_row(other)
            weight.copy_(other)
            return {"merged": seen, "restored": weight}

        return call

    def _torch(self, case: Case, o: Operands) -> Call:
        weight, lora_A, lora_B = o["weight"], o["lora_A"], o["lora_B"]

        def add(scaling: float) -> None:
            weight.addmm_(lora_B.to(weight.dtype), lora_A.to(weight.dtype), alpha=scaling)

        def call() -> Outputs:
            add(SCALING)
            if not self.unmerge:
                return {"merged": weight}
            seen = self._copy_row(weight)
            add(-SCALING)
            return {"merged": seen, "restored": weight}

        return call

    def _torch_split(self, case: Case, o: Operands) -> Call:
        """Splits factors into sums of two, so that half-precision products are float32-accurate."""
        weight, lora_A, lora_B = o["weight"], o["lora_A"], o["lora_B"]

        def parts(t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            high = t.to(weight.dtype)
            return high, (t.to(torch.float32) - high).to(weight.dtype)

        def call() -> Outputs:
            (Ah, Al), (Bh, Bl) = parts(lora_A), parts(lora_B)
            weight.addmm_(torch.cat([Bh, Bh, Bl], 1), torch.cat([Ah, Al, Ah]), alpha=SCALING)
            return {"merged": weight}

        return call

    def _peft(self, case: Case, o: Operands) -> Call:
        layer = make_peft_linear(o["weight"], [(o["lora_A"], o["lora_B"], SCALING)])
        weight = layer.get_base_layer().weight

        def call() -> Outputs:
            layer.merge()
            if not self.unmerge:
                layer.merged_adapters.clear()  # it merges a second time only what is not merged
                return {"merged": weight}
            seen = self._copy_row(weight)
            layer.unmerge()
            return {"merged": seen, "restored": weight}

        return call

    def _fastlora(self, case: Case, o: Operands) -> Call:
        weight, adapters = o["weight"], [(o["lora_A"], o["lora_B"], SCALING)]

        def call() -> Outputs:
            receipt = F.merge_(weight, adapters, receipt=self.unmerge)
            if receipt is None:
                return {"merged": weight}
            seen = self._copy_row(weight)
            F.unmerge_(weight, receipt)
            return {"merged": seen, "restored": weight}

        return call

    def _copy_row(self, weight: torch.Tensor) -> torch.Tensor:
        """Copies a row while merged: without it, doing nothing would pass for both steps."""
        return weight[-1:].clone()

    def expected(self, case: Case, operands: Operands, provider: str) -> Outputs:
        weight, lora_A, lora_B = (widen(operands[k]) for k in ("weight", "lora_A", "lora_B"))
        adapters = [] if provider == BASE else [(lora_A, lora_B, SCALING)]
        if self.unmerge:
            last = [(lora_A, lora_B[-1:], scaling) for lora_A, lora_B, scaling in adapters]
            restored = weight[spread_indices(case.shape["N"])]
            return {"merged": oracle.merge(weight[-1:], last), "restored": restored}
        rows = spread_indices(case.shape["N"])
        some = [(lora_A, lora_B[rows], scaling) for lora_A, lora_B, scaling in adapters]
        return {"merged": oracle.merge(weight[rows], some)}

    def sample(self, case: Case, outputs: Outputs) -> Outputs:
        rows = spread_indices(case.shape["N"])
        whole = "restored" if self.unmerge else "merged"
        return {
            name: t.detach().cpu()[rows] if name == whole else t.detach().cpu()
            for name, t in outputs.items()
        }

    def cost(self, case: Case, provider: str) -> tuple[int, int]:
        N, K, R = (case.shape[k] for k in "NKR")
        size, lora_size = case.element_sizes
        steps, adapter = (2 if self.unmerge else 1), (0 if provider == BASE else R * (K + N))
        flops = 0 if provider == BASE else 2 * N * K * R
        return steps * flops, steps * (2 * size * N * K + lora_size * adapter)
