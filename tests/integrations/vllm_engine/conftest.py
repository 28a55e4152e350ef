"""A small Llama, adapters of ranks 1 to 16, and what PEFT makes of them.

Run by ``make test-vllm`` in an environment of its own; other runs of pytest leave the folder out.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.integrations.vllm_engine.engine import Engine

VOCABULARY = 500
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANKS = (16, 1, 8, 3, 16, 4)


class World(NamedTuple):
    """Folders of the model and of its adapters, and the model itself in float32."""

    folder: Path
    model: Path
    adapters: list[str]
    wide: list[str]  # of the embedding and the head too
    base: LlamaForCausalLM


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128, intermediate_size=352, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=VOCABULARY, max_position_embeddings=256,
        tie_word_embeddings=False, initializer_range=0.08,
    )  # fmt: skip
    base = LlamaForCausalLM(config).eval()
    base.save_pretrained(folder / "base")
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"unk_token": "w0", "eos_token": "w1", "bos_token": "w2"}
    PreTrainedTokenizerFast(tokenizer_object=words, **names).save_pretrained(folder / "base")
    adapters = [save_adapter(base, folder / f"adapter{i}", r, i) for i, r in enumerate(RANKS)]
    more = ["embed_tokens", "lm_head"]
    wide = [save_adapter(base, folder / f"wide{i}", 8, 50 + i, more) for i in range(2)]
    return World(folder, folder / "base", adapters, wide, base)


def save_adapter(
    base: LlamaForCausalLM, folder: Path, rank: int, seed: int, more: list[str] | None = None
) -> str:
    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=LINEARS + (more or []))
    model = get_peft_model(copy.deepcopy(base), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name and parameter.ndim == 2:
            parameter.data = torch.randn_like(parameter) / parameter.shape[1] ** 0.5 / 2
    model.save_pretrained(folder)
    return str(folder)


class Peft:
    """Log-probabilities of PEFT, in a dtype."""

    def __init__(self, world: World, dtype: torch.dtype) -> None:
        self._base, self._dtype = world.base, dtype
        self._models: dict[str | None, Any] = {}

    def __call__(self, folder: str | None, tokens: list[int]) -> Tensor:
        """(len(tokens) - 1, V): of each token after the first, given those before."""
        model = self._models.get(folder)
        if model is None:
            model = copy.deepcopy(self._base)
            if folder is not None:
                model = PeftModel.from_pretrained(model, folder)
            model = self._models[folder] = model.to(self._dtype).eval()
        with torch.no_grad():
            logits = model(torch.tensor([tokens])).logits[0, :-1]
        return logits.float().log_softmax(-1)


@pytest.fixture(scope="session", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(scope="session")
def exact(world: World) -> Peft:
    return Peft(world, torch.float32)


@pytest.fixture(scope="session")
def rounded(world: World, dtype: torch.dtype) -> Peft:
    return Peft(world, dtype)


@pytest.fixture(scope="session")
def engine(world: World, dtype: torch.dtype) -> Iterator[Engine]:
    """With as many slots as there are adapters: all are full."""
    yield from _run(world, dtype, "engine", max_loras=len(world.adapters), max_lora_rank=16)


@pytest.fixture(scope="session")
def narrow(world: World) -> Iterator[Engine]:
    """With two slots for six adapters, and a prompt that is read in parts."""
    how = {"max_loras": 2, "max_lora_rank": 64, "max_num_batched_tokens": 32}
    yield from _run(world, torch.float32, "narrow", **how)


def _run(world: World, dtype: torch.dtype, name: str, **options: Any) -> Iterator[Engine]:
    log = world.folder / f"{name}-{str(dtype)[6:]}.log"
    engine = Engine(world.model, log, dtype=str(dtype)[6:], **options)
    yield engine
    engine.close()


def make_prompts(count: int, start: int = 0) -> list[list[int]]:
    """Prompts of different lengths and tokens."""
    return [[3 + (start + 37 * i + 11 * j) % 480 for j in range(5 + i % 7)] for i in range(count)]
