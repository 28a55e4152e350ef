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

from benchmarks.harness.case import Absent
from benchmarks.harness.machine import find_version

# Relative norms of logits: float32's rounding is 1e-7, and what virtual tokens change 1e-2 or more.
_SAME = 1e-4


def name_cache_argument(model: nn.Module) -> str:
    """Names the model's forward argument of earlier tokens' keys and values.

    5.24 takes the old name until 5.40, and warns.
    """
    taken = inspect.signature(model.forward).parameters
    return "cache" if "cache" in taken else "past_key_values"


def make_config(kind: str, tokens: int) -> Any:
    """Makes PEFT's config of "prefix" or "prompt" tuning; ``Absent`` if ``generate`` is wrong."""
    reason = explain_loss(kind)
    if reason:
        raise Absent(reason)
    return _make_config(kind, tokens)


@cache
def explain_loss(kind: str) -> str | None:
    """Says why ``generate`` of the installed packages differs from PEFT's own forward.

    One call of each on a tiny model shows it, so no list of versions has to. None where it does.
    """
    versions = find_version("peft"), find_version("transformers")
    pair = f"PEFT {versions[0]}'s {kind} tuning with transformers {versions[1]}"
    try:
        model, (written, computed, without) = _try_generate(kind)
    except Exception as error:  # nothing in it is ours
        return f"{pair}: {type(error).__name__}: {error}"
    if _compute_distance(computed, without) <= _SAME:
        return f"{pair}: forward ignores it"
    for token in range(written.shape[1]):
        apart = _compute_distance(written[:, token], computed[:, token])
        if apart > _SAME:
            return (
                f"{pair}: generate gets it wrong: from token {token + 1} on its logits are not "
                f"forward's, a relative difference of {apart:.2g}{_explain_renaming(model)}"
            )
    return None


def _explain_renaming(model: Any) -> str:
    name = name_cache_argument(model.get_base_model())
    return "" if name == "past_key_values" else f" (past_key_values is now called {name})"


def _make_config(kind: str, tokens: int) -> Any:
    import peft

    make = {"prefix": peft.PrefixTuningConfig, "prompt": peft.PromptTuningConfig}[kind]
    return make(task_type="CAUSAL_LM", num_virtual_tokens=tokens, inference_mode=True)


@torch.no_grad()
def _try_generate(kind: str) -> tuple[Any, tuple[Tensor, Tensor, Tensor]]:
    """Returns a model and two tokens' logits: by ``generate``, forward, the base's forward."""
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
        model = peft.get_peft_model(base, _make_config(kind, 4)).eval()
        (encoder,) = model.prompt_encoder.values()
        for parameter in (*base.parameters(), encoder.embedding.weight):
            parameter.normal_(std=0.5)  # attention looks at every token
        generated = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=2,
            do_sample=False,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        tokens = generated.sequences[:, :-1]
        computed, without = (m(input_ids=tokens).logits[:, -2:] for m in (model, base))
    return model, (torch.stack(generated.logits, 1), computed, without)


def _compute_distance(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())
