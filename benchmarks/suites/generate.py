"""Suite ``model``, ``model-generate``: transformers' ``generate`` of a batch with many adapters."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness.case import BASE, Call, Case, Operands, Outputs
from benchmarks.peers.virtual import name_cache_argument
from benchmarks.suites import llama, models

# Providers that compute W + scaling * lora_B @ lora_A beforehand, and those of another function.
_MERGED = ("merged", "peft-merged")
_VIRTUAL = ("peft-prefix", "peft-prompt")


class Generate(llama.OfLlama):
    """Logits of each of ``new`` tokens after B rows of L tokens, S adapters in turn.

    The tokens are fixed beforehand, so that all providers do the same work and logits can be
    compared in any dtype. one: the case has one adapter, and also the providers that take no more:
    merged beforehand, and PEFT's prefix and prompt tuning, which compute another function and have
    expected outputs of their own.
    """

    name, op, waits = "model-generate", "multi_lora_linear", True

    def __init__(self, *, one: bool) -> None:
        super().__init__()
        self.one = one
        self.providers = {
            BASE: lambda case, o: _prepare(llama.build_model(case, o), case, o),
            "torch": _prepare_torch,
            "peft": _prepare_peft,
            "fastlora": _prepare_fastlora,
        }
        if one:
            self.providers |= {
                "peft-unmerged": _prepare_one(models.build_peft),
                "merged": _prepare_one(models.build_merged),
                "peft-merged": _prepare_one(models.build_peft_merged),
                "peft-prefix": _prepare_one(partial(models.build_peft_virtual, kind="prefix")),
                "peft-prompt": _prepare_one(partial(models.build_peft_virtual, kind="prompt")),
            }

    def inputs(self, case: Case, draw: torch.Generator) -> Operands:
        B, L, new, H = (case.shape[k] for k in ("B", "L", "new", "H"))
        tokens = torch.randint(llama.VOCABULARY, (B, L + new), generator=draw).to(case.device)
        o = {"ids": tokens[:, :L], "forced": tokens[:, L:]}
        if self.one:
            _, heads, width = llama.count_heads(case)
            of_layers = 2 * case.shape["layers"] * heads * width
            o["prefix"] = case.tensor(draw, models.VIRTUAL_TOKENS, of_layers)
            o["prompt"] = case.tensor(draw, models.VIRTUAL_TOKENS, H)
        return o

    def truth(self, case: Case, provider: str) -> str:
        return provider if provider in (BASE, *_VIRTUAL) else "adapters"

    def expected(self, case: Case, operands: Operands, provider: str) -> Outputs:
        """Computes all tokens at once: earlier ones are known, and no cache is needed."""
        o, key = operands, self.truth(case, provider)
        tokens = torch.cat([o["ids"], o["forced"][:, :-1]], 1)
        B, new = o["forced"].shape
        logits = torch.empty(B, new, llama.VOCABULARY, dtype=torch.float64)
        of_row = torch.tensor(_assign_slots(case) if key == "adapters" else [-1] * B)
        for slot in of_row.unique().tolist():
            model, _ = llama.build_exact(case, o, slot if slot >= 0 else None)
            rows = (of_row == slot).nonzero().flatten()
            logits[rows] = self._exactly(case, o, model, tokens[rows], key)[:, -new:].cpu()
        return {"logits": logits}

    @torch.no_grad()
    def _exactly(self, case: Case, o: Operands, model: Any, tokens: Tensor, key: str) -> Tensor:
        x, past = model.get_input_embeddings()(tokens), None
        if key == "peft-prompt":
            before = o["prompt"].double().expand(len(x), -1, -1)
            x = torch.cat([before, x], 1)
        if key == "peft-prefix":
            _, heads, width = llama.count_heads(case)
            past = llama.import_or_absent("transformers").DynamicCache()
            # Each layer's keys, then its values, before the first token's.
            prefix = o["prefix"].double().unflatten(1, (-1, heads, width)).transpose(0, 1)
            each = [t.transpose(0, 1).expand(len(x), -1, -1, -1) for t in prefix]
            for layer, (k, v) in enumerate(zip(each[::2], each[1::2], strict=True)):
                past.update(k, v, layer)
        return model(inputs_embeds=x, **{name_cache_argument(model): past}).logits

    def sample(self, case: Case, outputs: Outputs) -> Outputs:
        return {name: t.cpu() for name, t in outputs.items()}

    def cost(self, case: Case, provider: str) -> tuple[int, int]:
        """Counts each weight and adapter in use once a step, and earlier keys and values."""
        B, L, new, layers, R = (case.shape[k] for k in ("B", "L", "new", "layers", "R"))
        size, lora_size = case.element_sizes
        adapted = provider not in (BASE, *_MERGED, *_VIRTUAL)
        before = models.VIRTUAL_TOKENS if provider in _VIRTUAL else 0
        query, heads, width = llama.count_heads(case)
        flops = moved = 0
        for step in range(new):
            # A prompt's tokens go through the model as the others do, a prefix's are there.
            first = L + (before if provider == "peft-prompt" else 0)
            T, context = B * (first if step == 0 else 1), before + L + step
            for N, K in llama.list_linears(case).values():
                flops += 2 * T * (K * N + R * (K + N) * adapted)
                moved += size * (K * N + T * (K + N))
                moved += lora_size * len(set(_assign_slots(case))) * R * (K + N) * adapted
            # Of the last token alone.
            flops += 2 * B * case.shape["H"] * llama.VOCABULARY
            moved += size * llama.VOCABULARY * (case.shape["H"] + B) + size * B * case.shape["H"]
            # Q K^T and P V; the mask leaves half of the first step's.
            flops += layers * 4 * T * context * query * width // (2 if step == 0 else 1)
            moved += layers * 2 * size * B * context * heads * width
        return flops, moved


def _assign_slots(case: Case) -> list[int]:
    """Assigns a slot to each row."""
    return [row % case.shape["S"] for row in range(case.shape["B"])]


class _Forced:
    """Logits processor that leaves one token of a row: the one fixed for the step."""

    def __init__(self, o: Operands) -> None:
        self.length = o["ids"].shape[1]
        tokens = o["forced"].T[..., None]  # [new, B, 1]
        scores = torch.full((*tokens.shape[:2], llama.VOCABULARY), -torch.inf, device=tokens.device)
        self.scores = scores.scatter_(-1, tokens, 0.0)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return self.scores[input_ids.shape[1] - self.length]


def _prepare(model: Any, case: Case, o: Operands, **adapter: Any) -> Call:
    settings = {
        "attention_mask": torch.ones_like(o["ids"]),
        "max_new_tokens": case.shape["new"],
        "do_sample": False,
        "pad_token_id": 0,
        "logits_processor": [_Forced(o)],
        "output_logits": True,
        "return_dict_in_generate": True,
    }

    def call() -> Outputs:
        written = model.generate(input_ids=o["ids"], **settings, **adapter)
        return {"logits": torch.stack(written.logits, 1)}

    return call


def _prepare_one(build: Callable[[Case, Operands], nn.Module]) -> Callable[[Case, Operands], Call]:
    """Prepares a model of one adapter, without names of rows."""
    return lambda case, o: _prepare(build(case, o), case, o)


def _prepare_torch(case: Case, o: Operands) -> Call:
    slots = _assign_slots(case)
    one = len(set(slots)) == 1
    return _prepare(
        models.build_lean(case, o) if one else models.build_lean_many(case, o, slots), case, o
    )


def _prepare_peft(case: Case, o: Operands) -> Call:
    model, names = (
        models.build_peft(case, o, _assign_slots(case)),
        [str(s) for s in _assign_slots(case)],
    )
    return _prepare(model, case, o, adapter_names=names)


def _prepare_fastlora(case: Case, o: Operands) -> Call:
    server, names = (
        models.build_server(case, o, _assign_slots(case)),
        [str(s) for s in _assign_slots(case)],
    )
    return _prepare(server, case, o, adapter_names=names)
