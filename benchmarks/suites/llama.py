"""Llama of the case's sizes: its tensors, transformers' model on them, and the same in float64.

H hidden, I intermediate, layers; a vocabulary of bytes. Heads are 32 wide as in the demo's model;
from H = 1024 on they are 128 wide, four to a key and a value, as in Llama 3.
"""

from __future__ import annotations

import importlib
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness.case import Absent, Case, Operands, Work

VOCABULARY = 256
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

_HEAD = "lm_head.weight"
_EMBEDDINGS = "model.embed_tokens.weight"


class OfLlama(Work):
    """Work on such a model; its operands are the model's tensors and others of its own."""

    suite = "model"

    @abstractmethod
    def inputs(self, case: Case, draw: torch.Generator) -> Operands:
        """Draws the operands besides the model's."""

    def operands(self, case: Case, seed: int) -> Operands:
        draw = torch.Generator().manual_seed(seed)
        of_model = {**_draw_weights(case, draw), **_draw_adapters(case, draw)}
        return {**of_model, **self.inputs(case, draw)}


def import_or_absent(package: str) -> Any:
    """Imports the package; raises ``Absent`` where that fails."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise Absent(f"{package} cannot be imported: {error}") from error


def count_heads(case: Case) -> tuple[int, int, int]:
    """Returns the numbers of query heads and of key and value heads, and their width."""
    H = case.shape["H"]
    width = 128 if H >= 1024 else 32
    return H // width, H // width // (4 if H >= 1024 else 1), width


def list_linears(case: Case) -> dict[str, tuple[int, int]]:
    """Lists (N, K) of every linear that has an adapter, in the model's order."""
    H, I = case.shape["H"], case.shape["I"]  # noqa: E741
    _, kv_heads, width = count_heads(case)
    kv = kv_heads * width
    block = {
        "self_attn.q_proj": (H, H),
        "self_attn.k_proj": (kv, H),
        "self_attn.v_proj": (kv, H),
        "self_attn.o_proj": (H, H),
        "mlp.gate_proj": (I, H),
        "mlp.up_proj": (I, H),
        "mlp.down_proj": (H, I),
    }
    return {
        f"model.layers.{layer}.{name}": shape
        for layer in range(case.shape["layers"])
        for name, shape in block.items()
    }


def _draw_weights(case: Case, draw: torch.Generator) -> Operands:
    """Draws the base's tensors by the names of its state."""
    H, layers = case.shape["H"], case.shape["layers"]
    import_or_absent("transformers")
    norms = ["model.norm"]
    for layer in range(layers):
        norms += [f"model.layers.{layer}.{n}_layernorm" for n in ("input", "post_attention")]
    weights = {
        f"{name}.weight": case.tensor(draw, N, K, scale=K**-0.5)
        for name, (N, K) in list_linears(case).items()
    }
    weights[_EMBEDDINGS] = case.tensor(draw, VOCABULARY, H)
    weights[_HEAD] = case.tensor(draw, VOCABULARY, H, scale=H**-0.5)
    for name in norms:
        weights[f"{name}.weight"] = 1 + case.tensor(draw, H, scale=0.1)
    return weights


def _draw_adapters(case: Case, draw: torch.Generator) -> Operands:
    """Draws lora_A (S, R, K) and lora_B (S, N, R) of every linear; one slot without an S."""
    S, R = case.shape.get("S", 1), case.shape["R"]
    factors = {}
    for name, (N, K) in list_linears(case).items():
        factors[f"{name}.lora_A"] = case.adapter(draw, S, R, K, scale=K**-0.5)
        # An adapter's part is half of a layer's output: one that is missing or wrong shows.
        factors[f"{name}.lora_B"] = case.adapter(draw, S, N, R, scale=0.25 * R**-0.5)
    return factors


def choose_scaling(case: Case, slot: int) -> float:
    """Returns a scaling around 2, another for every adapter."""
    return 2.0 + slot / case.shape.get("S", 1)


def build_model(case: Case, state: Mapping[str, Tensor]) -> Any:
    """Builds transformers' model on the base's tensors, without copies."""
    llama = import_or_absent("transformers.models.llama.modeling_llama")
    config = _make_config(case)
    with torch.device("meta"):
        model = llama.LlamaForCausalLM(config)
    model.load_state_dict({name: state[name] for name in model.state_dict()}, assign=True)
    # Computed, not loaded: no state has it.
    model.model.rotary_emb = llama.LlamaRotaryEmbedding(config).to(state[_HEAD].device)
    return model.requires_grad_(False).eval()


def build_exact(case: Case, o: Operands, slot: int | None) -> tuple[Any, dict[str, Tensor]]:
    """Builds the model of dense float64 weights, and those of its linears; slot None: no adapter.

    A slot's weights are ``W + scaling * lora_B @ lora_A``. Tables of angles stay float32, as they
    are in every model; norms, which transformers computes in float32, do not.
    """
    state = {name: o[name].detach().double() for name in o if name.startswith(("model.", "lm_"))}
    for name in list_linears(case) if slot is not None else ():
        assert slot is not None
        lora_A, lora_B = (state[f"{name}.lora_{f}"][slot] for f in "AB")
        state[f"{name}.weight"] += choose_scaling(case, slot) * lora_B @ lora_A
    model = build_model(case, state)
    for name, module in list(model.named_modules()):
        if name.endswith("norm"):
            norm = nn.RMSNorm(module.weight.shape, eps=module.variance_epsilon, device="meta")
            norm.weight = module.weight
            model.set_submodule(name, norm)
    return model, {name: model.get_parameter(f"{name}.weight") for name in list_linears(case)}


def _make_config(case: Case) -> Any:
    query, keys, width = count_heads(case)
    return import_or_absent("transformers").LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=case.shape["H"],
        intermediate_size=case.shape["I"],
        num_hidden_layers=case.shape["layers"],
        num_attention_heads=query,
        num_key_value_heads=keys,
        head_dim=width,
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
