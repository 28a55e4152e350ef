"""Suite ``model``, ``model-generate``: transformers' ``generate`` of a batch with many adapters."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness.work import BASE, Call, Case, Operands, Outputs
from benchmarks.peers.virtual import cache_argument
from benchmarks.suites import llama, models

# Who computes W + scaling * lora_B @ lora_A beforehand, and who another function altogether.
_MERGED = ("merged", "peft-merged")
_VIRTUAL = ("peft-prefix", "peft-prompt")


class Generate(llama.OfLlama):
    """The logits of each of ``new`` tokens that B rows of L tokens go on with, S adapters in turn.

    Which tokens these are is settled beforehand, the same for all: everyone has the same work, and
    logits that can be compared in any dtype. one: the case has one adapter, thus also the ways
    that know no more: merged beforehand, and PEFT's prefix and prompt tuning, which compute
    something else and have a truth of their own.
    """

    name, op, waits = "model-generate", "multi_lora_linear", True

    def __init__(self, *, one: bool) -> None:
        super().__init__()
        self.one = one
        self.providers = {
            BASE: lambda case, o: _generated(llama.built(case, o), case, o),
            "torch": _torch,
            "peft": _peft,
            "fastlora": _fastlora,
        }
        if one:
            self.providers |= {
                "peft-unmerged": _of(models.peft_lora),
                "merged": _of(models.merged),
                "peft-merged": _of(models.peft_merged),
                "peft-prefix": _of(partial(models.peft_virtual, kind="prefix")),
                "peft-prompt": _of(partial(models.peft_virtual, kind="prompt")),
            }

    def inputs(self, case: Case, draw: torch.Generator) -> Operands:
        B, L, new, H = (case.shape[k] for k in ("B", "L", "new", "H"))
        tokens = torch.randint(llama.VOCABULARY, (B, L + new), generator=draw).to(case.device)
        o = {"ids": tokens[:, :L], "forced": tokens[:, L:]}
        if self.one:
            _, heads, width = llama.heads(case)
            of_layers = 2 * case.shape["layers"] * heads * width
            o["prefix"] = case.tensor(draw, models.VIRTUAL_TOKENS, of_layers)
            o["prompt"] = case.tensor(draw, models.VIRTUAL_TOKENS, H)
        return o

    def truth(self, case: Case, provider: str) -> str:
        return provider if provider in (BASE, *_VIRTUAL) else "adapters"

    def expected(self, case: Case, operands: Operands, provider: str) -> Outputs:
        """All tokens at once: what came before is known, and no cache is needed."""
        o, key = operands, self.truth(case, provider)
        tokens = torch.cat([o["ids"], o["forced"][:, :-1]], 1)
        B, new = o["forced"].shape
        logits = torch.empty(B, new, llama.VOCABULARY, dtype=torch.float64)
        of_row = torch.tensor(_slots(case) if key == "adapters" else [-1] * B)
        for slot in of_row.unique().tolist():
            model, _ = llama.exact(case, o, slot if slot >= 0 else None)
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
            _, heads, width = llama.heads(case)
            past = llama.needs("transformers").DynamicCache()
            # Of every layer the keys, then the values, that stand before the first token's.
            prefix = o["prefix"].double().unflatten(1, (-1, heads, width)).transpose(0, 1)
            each = [t.transpose(0, 1).expand(len(x), -1, -1, -1) for t in prefix]
            for layer, (k, v) in enumerate(zip(each[::2], each[1::2], strict=True)):
                past.update(k, v, layer)
        return model(inputs_embeds=x, **{cache_argument(model): past}).logits

    def sample(self, case: Case, outputs: Outputs) -> Outputs:
        return {name: t.cpu() for name, t in outputs.items()}

    def cost(self, case: Case, provider: str) -> tuple[int, int]:
        """Each weight and adapter in use once a step, and the keys and values of earlier tokens."""
        B, L, new, layers, R = (case.shape[k] for k in ("B", "L", "new", "layers", "R"))
        size, lora_size = case.element_sizes
        adapted = provider not in (BASE, *_MERGED, *_VIRTUAL)
        before = models.VIRTUAL_TOKENS if provider in _VIRTUAL else 0
        query, heads, width = llama.heads(case)
        flops = moved = 0
        for step in range(new):
            # A prompt's tokens go through the model as the others do, a prefix's are there.
            first = L + (before if provider == "peft-prompt" else 0)
            T, context = B * (first if step == 0 else 1), before + L + step
            for N, K in llama.linears(case).values():
                flops += 2 * T * (K * N + R * (K + N) * adapted)
                moved += size * (K * N + T * (K + N))
                moved += lora_size * len(set(_slots(case))) * R * (K + N) * adapted
            # Of the last token alone.
            flops += 2 * B * case.shape["H"] * llama.VOCABULARY
            moved += size * llama.VOCABULARY * (case.shape["H"] + B) + size * B * case.shape["H"]
            # Q K^T and P V; the mask leaves half of the first step's.
            flops += layers * 4 * T * context * query * width // (2 if step == 0 else 1)
            moved += layers * 2 * size * B * context * heads * width
        return flops, moved


def _slots(case: Case) -> list[int]:
    """Of each row."""
    return [row % case.shape["S"] for row in range(case.shape["B"])]


class _Forced:
    """A logits processor that leaves one token of a row: that which is settled for the step."""

    def __init__(self, o: Operands) -> None:
        self.length = o["ids"].shape[1]
        tokens = o["forced"].T[..., None]  # [new, B, 1]
        scores = torch.full((*tokens.shape[:2], llama.VOCABULARY), -torch.inf, device=tokens.device)
        self.scores = scores.scatter_(-1, tokens, 0.0)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return self.scores[input_ids.shape[1] - self.length]


def _generated(model: Any, case: Case, o: Operands, **whose: Any) -> Call:
    how = {
        "attention_mask": torch.ones_like(o["ids"]),
        "max_new_tokens": case.shape["new"],
        "do_sample": False,
        "pad_token_id": 0,
        "logits_processor": [_Forced(o)],
        "output_logits": True,
        "return_dict_in_generate": True,
    }

    def call() -> Outputs:
        written = model.generate(input_ids=o["ids"], **how, **whose)
        return {"logits": torch.stack(written.logits, 1)}

    return call


def _of(build: Callable[[Case, Operands], nn.Module]) -> Callable[[Case, Operands], Call]:
    """A model that knows one adapter, which no row names."""
    return lambda case, o: _generated(build(case, o), case, o)


def _torch(case: Case, o: Operands) -> Call:
    slots = _slots(case)
    one = len(set(slots)) == 1
    return _generated(models.lean(case, o) if one else models.lean_many(case, o, slots), case, o)


def _peft(case: Case, o: Operands) -> Call:
    model, names = models.peft_lora(case, o, _slots(case)), [str(s) for s in _slots(case)]
    return _generated(model, case, o, adapter_names=names)


def _fastlora(case: Case, o: Operands) -> Call:
    server, names = models.served(case, o, _slots(case)), [str(s) for s in _slots(case)]
    return _generated(server, case, o, adapter_names=names)
