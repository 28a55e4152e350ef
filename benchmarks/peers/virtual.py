"""PEFT's prefix and prompt tuning, and whether ``generate`` of the transformers beside it has them.

transformers 5.24 calls a forward's earlier keys and values ``cache``, which were
``past_key_values``. PEFT 0.21.2 goes by the old name: ``generate`` then ignores a prefix and puts
a prompt in again before every later token, without an error: nothing of ours that fails a gate.
"""

from __future__ import annotations

import inspect
import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness.machine import version
from benchmarks.harness.work import Absent

# Relative norms of logits: float32's rounding is 1e-7, and what virtual tokens change 1e-2 or more.
_SAME = 1e-4


def cache_argument(model: nn.Module) -> str:
    """What the model's forward calls earlier tokens' keys and values: the one place that asks.

    5.24 takes the old name until 5.40, and warns.
    """
    taken = inspect.signature(model.forward).parameters
    return "cache" if "cache" in taken else "past_key_values"


def tuning(kind: str, tokens: int) -> Any:
    """PEFT's config of "prefix" or "prompt" tuning; ``Absent`` where ``generate`` gets it wrong."""
    reason = lost(kind)
    if reason:
        raise Absent(reason)
    return _config(kind, tokens)


@cache
def lost(kind: str) -> str | None:
    """Why ``generate`` of the installed packages does not write what PEFT's own forward computes.

    One call of each on a tiny model shows it, so no list of versions has to. None where it does.
    """
    pair = f"PEFT {version('peft')}'s {kind} tuning with transformers {version('transformers')}"
    try:
        model, (written, computed, without) = _tried(kind)
    except Exception as error:  # nothing in it is ours
        return f"{pair}: {type(error).__name__}: {error}"
    if _apart(computed, without) <= _SAME:
        return f"{pair}: forward ignores it"
    for token in range(written.shape[1]):
        apart = _apart(written[:, token], computed[:, token])
        if apart > _SAME:
            return (
                f"{pair}: generate gets it wrong: from token {token + 1} on its logits are not "
                f"forward's, a relative difference of {apart:.2g}{_renamed(model)}"
            )
    return None


def _renamed(model: Any) -> str:
    name = cache_argument(model.get_base_model())
    return "" if name == "past_key_values" else f" (past_key_values is now called {name})"


def _config(kind: str, tokens: int) -> Any:
    import peft

    make = {"prefix": peft.PrefixTuningConfig, "prompt": peft.PromptTuningConfig}[kind]
    return make(task_type="CAUSAL_LM", num_virtual_tokens=tokens, inference_mode=True)


@torch.no_grad()
def _tried(kind: str) -> tuple[Any, tuple[Tensor, Tensor, Tensor]]:
    """A model and two tokens' logits: of ``generate``, of forward, of its forward without it."""
    import peft
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    ids = torch.tensor([[1, 2, 3]])
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names that are going to go
        torch.manual_seed(0)
        base = transformers.LlamaForCausalLM(config)
        model = peft.get_peft_model(base, _config(kind, 4)).eval()
        (encoder,) = model.prompt_encoder.values()
        for parameter in (*base.parameters(), encoder.embedding.weight):
            parameter.normal_(std=0.5)  # attention looks at every token
        found = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=2,
            do_sample=False,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        tokens = found.sequences[:, :-1]
        computed, without = (m(input_ids=tokens).logits[:, -2:] for m in (model, base))
    return model, (torch.stack(found.logits, 1), computed, without)


def _apart(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())
