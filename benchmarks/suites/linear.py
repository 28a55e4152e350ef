"""Suite ``linear``: one adapter on a frozen linear layer, forward alone or with its backward.

Or without the layer: onto the output that it gave.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as nnf

from benchmarks.harness.case import (
    BASE,
    DTYPES,
    Builder,
    Call,
    Case,
    Operands,
    Outputs,
    Work,
    spread_indices,
    widen,
)
from benchmarks.harness.oracle import compute_gradients, oracle
from benchmarks.peers.calls import try_call
from benchmarks.peers.compiling import Compile, compile_call, leave_alone
from benchmarks.peers.peft import draw_torch_mask, make_peft_linear
from benchmarks.peers.training import import_unsloth_linear
from benchmarks.suites.paths import run_along, run_on, run_with_base
from fastlora import batch_invariant
from fastlora import functional as F
from fastlora.backends import dropout

SCALING = 2.0
# Of the Triton kernels; kernels/choose/ledger.py has the list, but importing it needs triton.
PATHS = ("one_pass", "two_pass", "overlapped", "library")
ADD_PATHS = ("one_pass", "two_pass")  # the others are about the product with a weight
_TENSORS = ("x", "weight", "lora_A", "lora_B")


class Linear(Work):
    """``x @ weight.T + SCALING * (dropout(x) @ lora_A.T) @ lora_B.T``, the base ``x @ weight.T``.

    With ``backward``: and the gradients of x, lora_A and lora_B, for the base that of x alone.
    """

    suite = "linear"

    def __init__(self, *, backward: bool, invariant: bool = False, natively: bool = False) -> None:
        self.backward = backward
        self.name = "linear-train" if backward else "linear-forward"
        self.providers = {
            BASE: self._base,
            "torch": self._torch,
            "peft": self._peft,
            "fastlora": self._fastlora,
        }
        if invariant:
            # The cost of the same bits for a row in every batch.
            self.name = "linear-invariant"
            self.providers["fastlora-invariant"] = self._invariant
        elif natively:
            # The product with the weight on a CPU, by the native kernel and by torch.
            self.name = "linear-native"
            for name, whole in (("native", True), ("torch-product", False)):
                self.providers[name] = partial(run_with_base, whole, self._fastlora)
        else:
            self.gpu_providers = {path: partial(run_along, path, self._fastlora) for path in PATHS}
            self.gpu_providers["cuda"] = partial(run_on, "cuda", self._fastlora)
            self.gpu_providers["unsloth"] = partial(try_call, "unsloth", self._unsloth)
            self.compiled_providers = {
                "torch-compiled": partial(compile_call, self._torch),
                "peft-compiled": partial(compile_call, self._peft),
                "fastlora-compiled": partial(compile_call, self._fastlora),
            }

    def operands(self, case: Case, seed: int) -> Operands:
        M, K, N, R = (case.shape[k] for k in "MKNR")
        draw = torch.Generator().manual_seed(seed)
        o = {
            "x": case.tensor(draw, M, K),
            "weight": case.tensor(draw, N, K, scale=K**-0.5),
            "lora_A": case.adapter(draw, R, K, scale=K**-0.5),
            # The adapter's part is half of the output: one that is missing or wrong shows.
            "lora_B": case.adapter(draw, N, R, scale=0.25 * R**-0.5),
        }
        if self.backward:
            for name in ("x", "lora_A", "lora_B"):
                o[name].requires_grad_()
            o["dy"] = case.tensor(draw, M, N)
        return o

    def _base(self, case: Case, o: Operands) -> Call:
        return self._call(o, lambda: nnf.linear(o["x"], o["weight"]), [o["x"]])

    def _torch(self, case: Case, o: Operands, wrap: Compile = leave_alone) -> Call:
        x, weight, lora_A, lora_B = (o[name] for name in _TENSORS)

        def forward() -> Tensor:
            seen = nnf.dropout(x, case.dropout) if case.dropout else x
            h = nnf.linear(seen, lora_A.to(x.dtype))
            # In place: no further tensor of the output's size, in autograd neither.
            return nnf.linear(x, weight).addmm_(h, lora_B.to(x.dtype).T, alpha=SCALING)

        return self._call(o, wrap(forward), [x, lora_A, lora_B])

    def _peft(self, case: Case, o: Operands, wrap: Compile = leave_alone) -> Call:
        layer = make_peft_linear(o["weight"], [(o["lora_A"], o["lora_B"], SCALING)], case.dropout)
        x, leaves = o["x"], [o["x"], layer.lora_A["0"].weight, layer.lora_B["0"].weight]
        return self._call(o, wrap(lambda: layer(x)), leaves)

    def _fastlora(self, case: Case, o: Operands, wrap: Compile = leave_alone) -> Call:
        x, weight, lora_A, lora_B = (o[name] for name in _TENSORS)
        dropout_options = {"dropout_p": case.dropout, "training": case.dropout > 0}

        def forward() -> Tensor:
            return F.lora_linear(x, weight, lora_A, lora_B, SCALING, **dropout_options)

        return self._call(o, wrap(forward), [x, lora_A, lora_B])

    def _unsloth(self, case: Case, o: Operands) -> Call:
        linear = import_unsloth_linear(case)
        x, weight, lora_A, lora_B = (o[name] for name in _TENSORS)

        def forward() -> Tensor:
            return linear(x, weight, lora_A, lora_B, SCALING)

        return self._call(o, forward, [x, lora_A, lora_B])

    def _invariant(self, case: Case, o: Operands) -> Call:
        call = self._fastlora(case, o)

        def invariant() -> Outputs:
            with batch_invariant():
                return call()

        return invariant

    def _call(self, o: Operands, forward: Callable[[], Tensor], leaves: list[Tensor]) -> Call:
        if not self.backward:
            return lambda: {"y": forward()}

        def forward_and_backward() -> Outputs:
            y = forward()
            grads = torch.autograd.grad(y, leaves, o["dy"])
            return {"y": y, **dict(zip(("dx", "dA", "dB"), grads, strict=False))}

        return forward_and_backward

    def truth(self, case: Case, provider: str) -> str:
        if not case.dropout or provider == BASE:
            return super().truth(case, provider)
        # Each library draws a mask of its own; fastlora's is the same along every path.
        return provider if provider in self.providers else "fastlora"

    def expected(self, case: Case, operands: Operands, provider: str) -> Outputs:
        o, scaling = operands, 0.0 if provider == BASE else SCALING
        factors = o["lora_A"], o["lora_B"], scaling
        mask = self._mask(case, o, provider)
        rows, columns, outs = self._sampled(case)
        keep = None if mask is None else mask[rows]
        y = oracle.lora_linear(
            o["x"][rows], widen(o["weight"]), *map(widen, factors[:2]), scaling, keep=keep
        )
        if not self.backward:
            return {"y": y}
        # Of some features, so that every token is summed and N*K gradients of the weight are not.
        gradients = compute_gradients(o["dy"], o["x"], o["weight"], *factors, mask, columns, outs)
        return {"y": y, **(gradients if provider != BASE else {"dx": gradients["dx"]})}

    def sample(self, case: Case, outputs: Outputs) -> Outputs:
        rows, columns, outs = self._sampled(case)
        index = {
            "y": (rows,),
            "dx": (slice(None), columns),
            "dA": (slice(None), columns),
            "dB": (outs,),
        }
        return {name: t.detach().cpu()[index[name]] for name, t in outputs.items()}

    def _sampled(self, case: Case) -> tuple[Tensor, Tensor, Tensor]:
        return (
            spread_indices(case.shape["M"]),
            spread_indices(case.shape["K"]),
            spread_indices(case.shape["N"]),
        )

    def _mask(self, case: Case, o: Operands, provider: str) -> Tensor | None:
        """Draws the mask that the provider's call multiplies x by, from the generator's state."""
        x, p = o["x"], case.dropout
        if not p or provider == BASE:
            return None
        if provider not in ("torch", "peft"):
            keep = dropout.keep_mask(x.shape[0], x.shape[1], p, dropout.new_seed(x.device))
            factor = dropout.keep_scale(p)
        else:
            # PEFT drops from its copy of x in the adapters' dtype.
            dtype = o["lora_A"].dtype if provider == "peft" else DTYPES[case.dtype]
            keep, factor = draw_torch_mask(x, p, dtype), 1 / (1 - p)
        share, noise = float(keep.double().mean()), (p * (1 - p) / keep.numel()) ** 0.5
        if abs(share - (1 - p)) > 6 * noise:
            raise ValueError(f"the dropout mask keeps {share:.4f} of the elements for p = {p}")
        return keep.double() * factor

    def cost(self, case: Case, provider: str) -> tuple[int, int]:
        M, K, N, R = (case.shape[k] for k in "MKNR")
        size, lora_size = case.element_sizes
        adapter = 0 if provider == BASE else R * (K + N)
        flops = 2 * M * K * N + 2 * M * adapter
        moved = size * (M * K + K * N + M * N) + lora_size * adapter
        if self.backward:
            # dX of the base; then dH, its part of dX, dA, dB, for which x is read once more.
            flops += 2 * M * K * N + 4 * M * adapter
            moved += size * (M * N + K * N + M * K) + 2 * lora_size * adapter
            moved += size * M * K if adapter else 0
        return flops, moved


class LinearAdd(Linear):
    """``y += SCALING * (x @ lora_A.T) @ lora_B.T``: onto the output y of any base layer, in place.

    The base is a layer that gives such a y, ``x @ weight.T``: ratios are what the adapter adds to
    its time. A y that is timed keeps what earlier calls added, which changes nothing in the time.
    """

    op = "lora_add_"

    def __init__(self) -> None:
        super().__init__(backward=False)
        self.name = "linear-add"
        self.gpu_providers = {path: self.gpu_providers[path] for path in ADD_PATHS}
        self.compiled_providers: Mapping[str, Builder] = {}

    def operands(self, case: Case, seed: int) -> Operands:
        draw = torch.Generator().manual_seed(seed + 1)  # with x's seed it would begin as x does
        y = case.tensor(draw, case.shape["M"], case.shape["N"])
        return {**super().operands(case, seed), "y": y}

    def _torch(self, case: Case, o: Operands, wrap: Compile = leave_alone) -> Call:
        x, y, lora_A, lora_B = (o[name] for name in ("x", "y", "lora_A", "lora_B"))

        def add() -> Tensor:
            h = nnf.linear(x, lora_A.to(x.dtype))
            return y.addmm_(h, lora_B.to(x.dtype).T, alpha=SCALING)

        return self._call(o, wrap(add), [])

    def _peft(self, case: Case, o: Operands, wrap: Compile = leave_alone) -> Call:
        """Prepares PEFT's layer on a base that has its output ready; PEFT's sum is a new tensor."""
        layer = make_peft_linear(o["weight"], [(o["lora_A"], o["lora_B"], SCALING)])
        layer.get_base_layer().forward = lambda x: o["y"]
        return self._call(o, wrap(lambda: layer(o["x"])), [])

    def _fastlora(self, case: Case, o: Operands, wrap: Compile = leave_alone) -> Call:
        args = (o["y"], o["x"], o["lora_A"], o["lora_B"], SCALING)
        return self._call(o, wrap(lambda: F.lora_add_(*args)), [])

    def expected(self, case: Case, operands: Operands, provider: str) -> Outputs:
        if provider == BASE:
            return super().expected(case, operands, provider)
        rows, factors = self._sampled(case)[0], (operands["lora_A"], operands["lora_B"])
        part = oracle.lora_linear(operands["x"][rows], None, *map(widen, factors), SCALING)
        return {"y": widen(operands["y"][rows]) + part}

    def cost(self, case: Case, provider: str) -> tuple[int, int]:
        if provider == BASE:
            return super().cost(case, provider)
        M, K, N, R = (case.shape[k] for k in "MKNR")
        size, lora_size = case.element_sizes
        # y is read and written.
        return 2 * M * R * (K + N), size * M * (K + 2 * N) + lora_size * R * (K + N)
