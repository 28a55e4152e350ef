"""Tiny transformers models of random weights, and checks of what they compute."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

transformers.logging.set_verbosity_error()

# What PEFT says of adapters that tests make on purpose, and newer transformers of PEFT's own calls.
quiet = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated",
    "ignore:`lora_bias=True` was passed",
    "ignore:Adapter 'default'. [0-9]+ LoRA tensor",
    "ignore:Adapter name 'a' should not be contained",
    "ignore:fan_in_fan_out is set to",
    "ignore:Setting `save_embedding_layers`",
    "ignore:Model has `tie_word_embeddings=True`",
    "ignore:Input and output embeddings are no longer tied",
)

VOCABULARY = 97
# Relative norms, above twice the worst of 25 seeds: rounding in another order, a few hundred
# products to a sum, then two layers that pass it on. A half rounds what each layer gives to 2**-9
# or 2**-12.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 7e-2, torch.float16: 6e-3}


_DECODER: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "eos_token_id": None,
}


def llama(*, seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    return _built("Llama", "LlamaForCausalLM", _DECODER | options, seed, dtype)


def qwen2(*, seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    """As Llama, with biases at q, k and v."""
    return _built("Qwen2", "Qwen2ForCausalLM", _DECODER | options, seed, dtype)


def mistral(*, seed: int = 0, window: int = 5) -> nn.Module:
    """Every token sees ``window`` tokens, itself included."""
    sizes = _DECODER | {"sliding_window": window}
    return _built("Mistral", "MistralForCausalLM", sizes, seed, torch.float32)


def gemma2(*, seed: int = 0) -> nn.Module:
    """Its scores are capped."""
    return _built("Gemma2", "Gemma2ForCausalLM", _DECODER | {"head_dim": 8}, seed, torch.float32)


def bert(*, seed: int = 0, head: str = "MaskedLM", **options: Any) -> nn.Module:
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
    }
    return _built("Bert", f"BertFor{head}", sizes | options, seed, torch.float32)


def t5(*, seed: int = 0) -> nn.Module:
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": 2,
        "num_heads": 4,
        "decoder_start_token_id": 0,
        "pad_token_id": 0,
        "eos_token_id": None,
        "initializer_factor": 2.0,
    }
    return _built("T5", "T5ForConditionalGeneration", sizes, seed, torch.float32)


def gpt2(
    *, seed: int = 0, dtype: torch.dtype = torch.float32, head: str = "LMHead", **options: Any
) -> nn.Module:
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 32,
        "initializer_range": 0.3,
    }
    kind = "GPT2LMHeadModel" if head == "LMHead" else f"GPT2For{head}"
    return _built("GPT2", kind, sizes | options, seed, dtype)


def tokens(*shape: int) -> Tensor:
    return torch.randint(1, VOCABULARY, shape)


def logits(model: nn.Module, input_ids: Tensor, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=input_ids, **kwargs).logits


def randomise_lora(model: nn.Module, std: float = 0.3) -> nn.Module:
    """Normal numbers in every lora_B and lora_bias of a fastlora or PEFT model."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "lora_bias" in name:
                parameter.copy_(torch.randn(parameter.shape) * std)
    return model


def error(got: Tensor, want: Tensor) -> float:
    """|got - want| / |want|; infinite where either is not finite."""
    wide = want.detach().double()
    difference = (got.detach().double() - wide).norm() / wide.norm()
    return float(difference) if bool(difference.isfinite()) else float("inf")


def assert_agree(got: Tensor, want: Tensor, base: Tensor | None = None) -> None:
    """To the dtype's tolerance; ``base`` must lie five tolerances away, or nothing was shown."""
    tolerance = TOLERANCE[want.dtype]
    assert got.dtype == want.dtype
    assert error(got, want) <= tolerance
    if base is not None:
        assert error(base, want) >= 5 * tolerance


@contextmanager
def untouched(*models: nn.Module) -> Iterator[None]:
    """Modules, their types and attributes, and every parameter's bits stay as they are."""
    before = [_state(model) for model in models]
    yield
    assert [_state(model) for model in models] == before


def _built(
    family: str, kind: str, sizes: dict[str, Any], seed: int, dtype: torch.dtype
) -> nn.Module:
    config = getattr(transformers, f"{family}Config")(**sizes)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(transformers, kind)(config)
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.data.normal_(std=0.1)  # zero as built: they would hide a lost bias
    return model.to(dtype).eval()


def _state(model: nn.Module) -> dict[str, Any]:
    modules = {
        name: (id(module), type(module), module.training, tuple(vars(module)))
        for name, module in model.named_modules(remove_duplicate=False)
    }
    tensors = {
        name: (id(t), t.data_ptr(), t.requires_grad, t.dtype, t.grad is None, _raw(t))
        for name, t in [*model.named_parameters(), *model.named_buffers()]
    }
    return {"modules": modules, "tensors": tensors}


def _raw(t: Tensor) -> bytes:
    return b"" if t.is_meta else t.detach().flatten().view(torch.uint8).numpy().tobytes()
