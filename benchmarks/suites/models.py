"""Models with adapters: lean torch's, PEFT's and fastlora's, all on the same tensors."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

import fastlora
from benchmarks.harness.case import DTYPES, Case, Operands
from benchmarks.peers import virtual
from benchmarks.suites.llama import (
    TARGETS,
    build_model,
    choose_scaling,
    import_or_absent,
    list_linears,
)
from fastlora.serving import Factors

# Of prefix and prompt tuning.
VIRTUAL_TOKENS = 16


class Lean(nn.Module):
    """One adapter beside a frozen linear: two library products, accumulated in place."""

    def __init__(self, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, p: float):
        super().__init__()
        self.weight, self.scaling, self.p = weight, scaling, p
        self.lora_A, self.lora_B = _freeze(lora_A), _freeze(lora_B)

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


def build_lean(case: Case, o: Operands) -> Any:
    """Builds a model with slot 0's adapter in every linear."""
    model = build_model(case, o)
    for name in list_linears(case):
        layer = Lean(o[f"{name}.weight"], *_slice_factors(case, o, name, 0), case.dropout)
        model.set_submodule(name, layer)
    return model


def build_lean_many(case: Case, o: Operands, slots: Sequence[int]) -> Any:
    """Builds a model that runs row i of a batch through ``slots[i]``."""
    model, of_row = build_model(case, o), torch.tensor(slots, device=o["ids"].device)
    rows = {slot: (of_row == slot).nonzero().flatten() for slot in sorted(set(slots))}
    for name in list_linears(case):
        groups = [(rows[slot], *_slice_factors(case, o, name, slot)) for slot in rows]
        model.set_submodule(name, LeanMany(o[f"{name}.weight"], groups))
    return model


def build_peft(case: Case, o: Operands, slots: Sequence[int] = (0,)) -> Any:
    """Builds PEFT's model; adapters are named as their slots."""
    peft = import_or_absent("peft")
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
            build_model(case, o), config, adapter_name=str(first), low_cpu_mem_usage=True
        )
        for slot in others:
            model.add_adapter(str(slot), config, low_cpu_mem_usage=True)
    for name in list_linears(case):
        layer = model.base_model.model.get_submodule(name)
        for slot in (first, *others):
            lora_A, lora_B, factor = _slice_factors(case, o, name, slot)
            layer.lora_A[str(slot)].weight = _freeze(lora_A)
            layer.lora_B[str(slot)].weight = _freeze(lora_B)
            layer.scaling[str(slot)] = factor
    return model.train(case.dropout > 0)


def build_peft_patched(case: Case, o: Operands) -> Any:
    """Builds the same PEFT model on fastlora's kernels."""
    model = build_peft(case, o)
    fastlora.patch_peft(model, strict=True)
    return model


def build_fastlora(case: Case, o: Operands) -> Any:
    """Puts ``FastLoRALinear`` with slot 0's adapter in place of every linear but the head."""
    R = case.shape["R"]
    config = fastlora.LoRAConfig(
        r=R,
        lora_alpha=choose_scaling(case, 0) * R,
        lora_dropout=case.dropout,
        target_modules=TARGETS,
    )
    model = fastlora.replace_linear(build_model(case, o), config)
    for name in list_linears(case):
        layer: Any = model.get_submodule(name)
        lora_A, lora_B, _ = _slice_factors(case, o, name, 0)
        layer.lora_A = _freeze(lora_A)
        layer.lora_B = _freeze(lora_B)
    return model.train(case.dropout > 0)


def build_server(case: Case, o: Operands, slots: Sequence[int]) -> fastlora.MultiLoRAModel:
    """Builds a server with the slots' adapters on the device, named as their slots."""
    present = sorted(set(slots))
    server = fastlora.MultiLoRAModel(
        build_model(case, o),
        len(present),
        case.shape["R"],
        TARGETS,
        lora_dtype=DTYPES[case.lora_dtype or case.dtype],
    )
    for slot in present:
        adapter = {}
        for name in list_linears(case):
            lora_A, lora_B, factor = _slice_factors(case, o, name, slot)
            adapter[name] = Factors(lora_A.cpu(), lora_B.cpu(), factor)
        server.bank.add(str(slot), lambda adapter=adapter: adapter)
    return server


def build_peft_merged(case: Case, o: Operands) -> Any:
    """Builds a model into which PEFT has merged slot 0."""
    return build_peft(case, o).merge_and_unload()


def build_merged(case: Case, o: Operands) -> Any:
    """Builds a model into which fastlora has merged slot 0."""
    return fastlora.merge_and_unload(build_fastlora(case, o))


def build_peft_virtual(case: Case, o: Operands, kind: str) -> Any:
    """Builds PEFT's "prefix" or "prompt" tuning, of the operand of that name.

    Absent where ``generate`` of the transformers beside it gets that wrong.
    """
    peft = import_or_absent("peft")
    model = peft.get_peft_model(build_model(case, o), virtual.make_config(kind, VIRTUAL_TOKENS))
    (encoder,) = model.prompt_encoder.values()
    if encoder.embedding.weight.shape != o[kind].shape:
        raise ValueError(
            f"{kind}: PEFT keeps {tuple(encoder.embedding.weight.shape)}, expected "
            f"{tuple(o[kind].shape)}"
        )
    encoder.embedding.weight = _freeze(o[kind])
    return model.eval()


def make_trainable(case: Case, model: nn.Module) -> dict[str, nn.Parameter]:
    """Makes slot 0's factors require gradients; returns them in the order of the operands."""
    factors = {}
    for name, parameter in model.named_parameters():
        layer, lora, factor = name.removeprefix("base_model.model.").partition(".lora_")
        if lora:  # PEFT's go on: lora_A.0.weight
            factors[f"{layer}.lora_{factor[0]}"] = parameter.requires_grad_()
    return {
        f"{name}.lora_{f}": factors[f"{name}.lora_{f}"] for name in list_linears(case) for f in "AB"
    }


def _slice_factors(case: Case, o: Operands, name: str, slot: int) -> tuple[Tensor, Tensor, float]:
    return o[f"{name}.lora_A"][slot], o[f"{name}.lora_B"][slot], choose_scaling(case, slot)


def _freeze(t: Tensor) -> nn.Parameter:
    return nn.Parameter(t.detach(), requires_grad=False)
