"""Suite ``model``, ``model-train``: a training step of a Llama with an adapter in every linear."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness.case import BASE, Call, Case, Operands, Outputs
from benchmarks.peers.compiling import compile_module
from benchmarks.peers.training import apply_liger
from benchmarks.suites import llama, models
from benchmarks.suites.linear import Linear


class Train(llama.OfLlama):
    """Loss of B x L tokens, and the gradients of x (B, L, H), every lora_A and every lora_B.

    x, in the place of embedded tokens, has a gradient for all, as it has for blocks in the middle
    of a model; the frozen base has no other. An optimizer is no part of it: all would run the same
    one on the same parameters.
    """

    name = "model-train"
    # Four blocks in bf16: 0.019 in any of ten gradients and five seeds.
    yardstick_factor = 2.0

    def __init__(self) -> None:
        super().__init__()
        self.providers = {
            BASE: partial(_prepare_step, llama.build_model, adapters=False),
            "torch": partial(_prepare_step, models.build_lean),
            "peft": partial(_prepare_step, models.build_peft),
            "peft-patched": partial(_prepare_step, models.build_peft_patched),
            "fastlora": partial(_prepare_step, models.build_fastlora),
        }
        self.gpu_providers = {"peft-liger": partial(_prepare_step, _build_liger)}
        self.compiled_providers = {
            "base-compiled": partial(
                _prepare_step, llama.build_model, adapters=False, compiles=True
            ),
            "peft-compiled": partial(_prepare_step, models.build_peft, compiles=True),
            "fastlora-compiled": partial(_prepare_step, models.build_fastlora, compiles=True),
        }

    def inputs(self, case: Case, draw: torch.Generator) -> Operands:
        B, L, H = (case.shape[k] for k in "BLH")
        ids = torch.randint(llama.VOCABULARY, (B, L), generator=draw).to(case.device)
        return {"ids": ids, "x": case.tensor(draw, B, L, H)}

    def operands(self, case: Case, seed: int) -> Operands:
        o = super().operands(case, seed)
        o["x"].requires_grad_()
        return o

    def truth(self, case: Case, provider: str) -> str:
        return BASE if provider.startswith(BASE) else "adapters"

    def gated(self, case: Case) -> Case:
        # Every library draws masks of its own, one a layer; suite linear holds each to its mask.
        return replace(case, dropout=0.0)

    def expected(self, case: Case, operands: Operands, provider: str) -> Outputs:
        adapted = self.truth(case, provider) != BASE
        model, dense = llama.build_exact(case, operands, 0 if adapted else None)
        x = operands["x"].detach().double().requires_grad_()
        leaves = {name: weight.requires_grad_() for name, weight in dense.items() if adapted}
        logits = model(inputs_embeds=x, use_cache=False).logits[:, :-1]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), operands["ids"][:, 1:].flatten())
        dx, *grads = torch.autograd.grad(loss, [x, *leaves.values()])
        out = {"loss": loss.detach(), "dx": dx}
        for name, dW in zip(leaves, grads, strict=True):
            lora_A, lora_B = (operands[f"{name}.lora_{f}"][0].double() for f in "AB")
            # Of W + scaling * lora_B @ lora_A.
            out[f"{name}.lora_A"] = llama.choose_scaling(case, 0) * lora_B.T @ dW
            out[f"{name}.lora_B"] = llama.choose_scaling(case, 0) * dW @ lora_A.T
        return self.sample(case, out)

    def sample(self, case: Case, outputs: Outputs) -> Outputs:
        """Selects all; a block's gradients of seven lora_A are one output, and those of lora_B."""
        out = {name: outputs[name].detach().cpu() for name in ("loss", "dx")}
        for name, gradient in outputs.items():
            if ".lora_" in name:
                block, factor = name.split(".")[2], name[-1]
                key, flat = f"d{factor}.{block}", gradient.detach().flatten().cpu()
                out[key] = torch.cat([out[key], flat]) if key in out else flat
        return out

    def cost(self, case: Case, provider: str) -> tuple[int, int]:
        """Counts every linear as in suite ``linear``, and the attention's products."""
        B, L, layers, R = (case.shape[k] for k in ("B", "L", "layers", "R"))
        adapted = self.truth(case, provider) != BASE
        query, _, width = llama.count_heads(case)
        head = (llama.VOCABULARY, case.shape["H"])
        # Q K^T and P V, of which the mask leaves half; twice as many products backward.
        flops, moved = 3 * layers * 2 * B * L * L * query * width, 0
        for number, (N, K) in enumerate([*llama.list_linears(case).values(), head]):
            shape = {"M": B * L, "K": K, "N": N, "R": R}
            last = number == 7 * layers
            linear = replace(case, work=_LINEAR, shape=shape)
            each = _LINEAR.cost(linear, provider if adapted and not last else BASE)
            flops, moved = flops + each[0], moved + each[1]
        return flops, moved


_LINEAR = Linear(backward=True)


def _build_liger(case: Case, o: Operands) -> Any:
    return apply_liger(models.build_peft(case, o))


def _prepare_step(
    build: Callable[[Case, Operands], Any],
    case: Case,
    o: Operands,
    *,
    adapters: bool = True,
    compiles: bool = False,
) -> Call:
    model = build(case, o)
    leaves = {"dx": o["x"], **(models.make_trainable(case, model) if adapters else {})}
    run = compile_module(model, case.device) if compiles else model

    def call() -> Outputs:
        loss: Tensor = run(inputs_embeds=o["x"], labels=o["ids"], use_cache=False).loss
        grads = torch.autograd.grad(loss, list(leaves.values()))
        return {"loss": loss, **dict(zip(leaves, grads, strict=True))}

    return call
