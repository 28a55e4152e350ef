"""Base model: a small Llama that reads bytes, or the user's own from a directory."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)


def make_byte_tokenizer() -> PreTrainedTokenizerBase:
    """Makes a tokenizer of a token a byte: nothing to train, and it spells every text."""
    alphabet = sorted(ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE({symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = ByteLevelDecoder()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def make_small_llama(hidden: int, layers: int, vocabulary: int, seed: int) -> PreTrainedModel:
    """Makes an untrained Llama with ``layers`` blocks, heads of 32 and the usual proportions."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=8 * hidden // 3,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        max_position_embeddings=512,
        # Near 1 / sqrt(hidden). With a large model's 0.02 this one is half as far after as many
        # steps, and then LoRA has little to build on.
        initializer_range=0.06,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    return LlamaForCausalLM(config)


def load_user_model(path: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a causal language model in float32 and its tokenizer from a local directory.

    Raises FileNotFoundError when there is no such directory, ValueError when transformers cannot
    load one or the other from it.
    """
    if not Path(path).is_dir():
        raise FileNotFoundError(f"model: expected a directory, found none at {path}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(
            path, local_files_only=True, dtype=torch.float32
        )
    except Exception as error:  # whatever an unreadable file makes its reader raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"model: transformers cannot load {path}: {reason}") from error
    nn.Module.to(model, "cuda" if torch.cuda.is_available() else "cpu")
    return model.eval(), tokenizer


def clone(model: PreTrainedModel) -> PreTrainedModel:
    """Copies the model; nothing is shared with ``model``."""
    return copy.deepcopy(model)


def find_last_block(model: nn.Module) -> nn.Module:
    """Finds the last of the model's repeated blocks: of its longest ``nn.ModuleList``."""
    stacks = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m)]
    if not stacks:
        raise ValueError("model: expected blocks in an nn.ModuleList, found none")
    return max(stacks, key=len)[-1]


def cut_rows(tokenizer: PreTrainedTokenizerBase, text: str, length: int) -> Tensor:
    """Cuts ``text`` into rows (n, length) of tokens; an incomplete last row is dropped."""
    encoded = tokenizer(text, add_special_tokens=False, return_attention_mask=False)
    tokens = torch.tensor(encoded["input_ids"], dtype=torch.int64)
    return tokens[: len(tokens) // length * length].view(-1, length)
