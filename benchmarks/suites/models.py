"""Adapters on a whole model: the leanest torch, PEFT's, fastlora's, all on the same tensors."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

import fastlora
from benchmarks.harness.work import DTYPES, Case, Operands
from benchmarks.peers import virtual
from benchmarks.suites.llama import TARGETS, built, linears, needs, scaling
from fastlora.serving import Factors

# Of prefix and prompt tuning.
VIRTUAL_TOKENS = 16


class Lean(nn.Module):
    """One adapter beside a frozen linear: two library products, accumulated in place."""

    def __init__(self, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, p: float):
        super().__init__()
        self.weight, self.scaling, self.p = weight, scaling, p
        self.lora_A, self.lora_B = _frozen(lora_A), _frozen(lora_B)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        seen = nnf.dropout(rows, self.p) if self.p else rows
        h = nnf.linear(seen, self.lora_A.to(x.dtype))
        y = nnf.linear(rows, self.weight).addmm_(h, self.lora_B.to(x.dtype).T, alpha=self.scaling)
        return y.view(*x.shape[:-1], -1)


class LeanMany(nn.Module):
    """Rows of a batch with different adapters: a loop over those present, their rows known."""

    def __init__(self, weight: Tensor, groups: list[tuple[Tensor, Tensor, Tensor, float]]) -> None:
        super().__init__()
        self.weight, self.groups = weight, groups

    def forward(self, x: Tensor) -> Tensor:
        y = nnf.linear(x, self.weight)
        for rows, lora_A, lora_B, factor in self.groups:
            part = (x[rows] @ lora_A.to(x.dtype).T) @ lora_B.to(x.dtype).T
            y.index_add_(0, rows, part, alpha=factor)
        return y


def lean(case: Case, o: Operands) -> Any:
    """Slot 0's adapter everywhere."""
    model = built(case, o)
    for name in linears(case):
        layer = Lean(o[f"{name}.weight"], *_factors(case, o, name, 0), case.dropout)
        model.set_submodule(name, layer)
    return model


def lean_many(case: Case, o: Operands, slots: Sequence[int]) -> Any:
    """Row i of a batch through ``slots[i]``."""
    model, of_row = built(case, o), torch.tensor(slots, device=o["ids"].device)
    rows = {slot: (of_row == slot).nonzero().flatten() for slot in sorted(set(slots))}
    for name in linears(case):
        groups = [(rows[slot], *_factors(case, o, name, slot)) for slot in rows]
        model.set_submodule(name, LeanMany(o[f"{name}.weight"], groups))
    return model


def peft_lora(case: Case, o: Operands, slots: Sequence[int] = (0,)) -> Any:
    """PEFT's model; adapters are named as their slots."""
    peft = needs("peft")
    config = peft.LoraConfig(
        r=case.shape["R"],
        lora_dropout=case.dropout,
        target_modules=list(TARGETS),
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    first, *others = sorted(set(slots))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # every further adapter on one model is warned about
        model = peft.get_peft_model(
            built(case, o), config, adapter_name=str(first), low_cpu_mem_usage=True
        )
        for slot in others:
            model.add_adapter(str(slot), config, low_cpu_mem_usage=True)
    for name in linears(case):
        layer = model.base_model.model.get_submodule(name)
        for slot in (first, *others):
            lora_A, lora_B, factor = _factors(case, o, name, slot)
            layer.lora_A[str(slot)].weight = _frozen(lora_A)
            layer.lora_B[str(slot)].weight = _frozen(lora_B)
            layer.scaling[str(slot)] = factor
    return model.train(case.dropout > 0)


def peft_patched(case: Case, o: Operands) -> Any:
    """The same PEFT model on fastlora's kernels."""
    model = peft_lora(case, o)
    fastlora.patch_peft(model, strict=True)
    return model


def replaced(case: Case, o: Operands) -> Any:
    """``FastLoRALinear`` in place of every linear but the head, slot 0's adapter in it."""
    R = case.shape["R"]
    config = fastlora.LoRAConfig(
        r=R,
        lora_alpha=scaling(case, 0) * R,
        lora_dropout=case.dropout,
        target_modules=TARGETS,
    )
    model = fastlora.replace_linear(built(case, o), config)
    for name in linears(case):
        layer: Any = model.get_submodule(name)
        lora_A, lora_B, _ = _factors(case, o, name, 0)
        layer.lora_A = _frozen(lora_A)
        layer.lora_B = _frozen(lora_B)
    return model.train(case.dropout > 0)


def served(case: Case, o: Operands, slots: Sequence[int]) -> fastlora.MultiLoRAModel:
    """A server that has the slots' adapters on the device, named as their slots."""
    present = sorted(set(slots))
    server = fastlora.MultiLoRAModel(
        built(case, o),
        len(present),
        case.shape["R"],
        TARGETS,
        lora_dtype=DTYPES[case.lora_dtype or case.dtype],
    )
    for slot in present:
        adapter = {}
        for name in linears(case):
            lora_A, lora_B, factor = _factors(case, o, name, slot)
            adapter[name] = Factors(lora_A.cpu(), lora_B.cpu(), factor)
        server.bank.add(str(slot), lambda adapter=adapter: adapter)
    return server


def peft_merged(case: Case, o: Operands) -> Any:
    """The model after PEFT has merged slot 0 into its weights."""
    return peft_lora(case, o).merge_and_unload()


def merged(case: Case, o: Operands) -> Any:
    """The model after fastlora has merged slot 0 into its weights."""
    return fastlora.merge_and_unload(replaced(case, o))


def peft_virtual(case: Case, o: Operands, kind: str) -> Any:
    """PEFT's "prefix" or "prompt" tuning, of the operand of that name.

    Absent where ``generate`` of the transformers beside it gets that wrong.
    """
    peft = needs("peft")
    model = peft.get_peft_model(built(case, o), virtual.tuning(kind, VIRTUAL_TOKENS))
    (encoder,) = model.prompt_encoder.values()
    if encoder.embedding.weight.shape != o[kind].shape:
        raise ValueError(
            f"{kind}: PEFT keeps {tuple(encoder.embedding.weight.shape)}, expected "
            f"{tuple(o[kind].shape)}"
        )
    encoder.embedding.weight = _frozen(o[kind])
    return model.eval()


def trainable(case: Case, model: nn.Module) -> dict[str, nn.Parameter]:
    """Slot 0's factors, which require gradients from now on, in the order of the operands."""
    found = {}
    for name, parameter in model.named_parameters():
        layer, lora, factor = name.removeprefix("base_model.model.").partition(".lora_")
        if lora:  # PEFT's go on: lora_A.0.weight
            found[f"{layer}.lora_{factor[0]}"] = parameter.requires_grad_()
    return {f"{name}.lora_{f}": found[f"{name}.lora_{f}"] for name in linears(case) for f in "AB"}


def _factors(case: Case, o: Operands, name: str, slot: int) -> tuple[Tensor, Tensor, float]:
    return o[f"{name}.lora_A"][slot], o[f"{name}.lora_B"][slot], scaling(case, slot)


def _frozen(t: Tensor) -> nn.Parameter:
    return nn.Parameter(t.detach(), requires_grad=False)
