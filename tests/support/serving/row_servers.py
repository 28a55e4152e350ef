"""Servers of two adapters around tiny models, and each adapter's model alone."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn

import fastlora
from fastlora import LoRAConfig, MultiLoRAModel
from tests.support.models import error, randomise_lora

VOCABULARY = 97
TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64, "initializer_range": 0.3,
    "pad_token_id": 0, "eos_token_id": None, "bos_token_id": None,
}  # fmt: skip
DECODER = TEXT | {"num_key_value_heads": 2, "head_dim": 8}
IMAGE: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "image_size": 16, "patch_size": 8, "initializer_range": 0.3,
}  # fmt: skip
BART: dict[str, Any] = {
    "vocab_size": 120, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2,
    "decoder_start_token_id": 2, "init_std": 0.3, "forced_eos_token_id": None,
}  # fmt: skip
# The token that stands for a part of an image.
IMAGE_TOKEN = 90
CONFIG = LoRAConfig(r=4, target_modules="all-linear", exclude_modules=r".*experts.*")


def llava() -> nn.Module:
    config = tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(**IMAGE), text_config=tf.LlamaConfig(**DECODER),
        image_token_index=IMAGE_TOKEN, image_seq_length=4, vision_feature_layer=-1,
    )  # fmt: skip
    return tf.LlavaForConditionalGeneration(config)


def qwen2_5_vl() -> nn.Module:
    text = DECODER | {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}
    seen = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4,
        "out_hidden_size": 32, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2,
        "window_size": 16, "fullatt_block_indexes": [1], "in_channels": 3, "initializer_range": 0.3,
    }  # fmt: skip
    config = tf.Qwen2_5_VLConfig(
        text_config=text, vision_config=seen, image_token_id=IMAGE_TOKEN, video_token_id=91,
        vision_start_token_id=92, vision_end_token_id=93,
    )  # fmt: skip
    return tf.Qwen2_5_VLForConditionalGeneration(config)


def whisper() -> nn.Module:
    sizes = {"num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 20}
    none = {"suppress_tokens": None, "begin_suppress_tokens": None}
    model = tf.WhisperForConditionalGeneration(tf.WhisperConfig(**BART, **sizes, **none))
    settings = {
        "no_timestamps_token_id": 100, "is_multilingual": False, "pad_token_id": 0,
        "eos_token_id": 1, "forced_decoder_ids": None, "decoder_start_token_id": 2, **none,
    }  # fmt: skip
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    return model


def build_with_fixed_weights(build: Callable[[], nn.Module]) -> nn.Module:
    """Weights that matter, the same each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build().eval()
        for parameter in model.parameters():
            if parameter.dim() > 1 and float(parameter.detach().std()) < 0.05:
                parameter.data.normal_(std=0.2)
    return model


class Served:
    """A server of alice and bob; ``alone``: the model of each, and of nobody."""

    def __init__(self, build: Callable[[], nn.Module], path: Path, **options: Any) -> None:
        base = build_with_fixed_weights(build)
        self.server = MultiLoRAModel(
            copy.deepcopy(base), max_rank=4, exclude_modules=CONFIG.exclude_modules, **options
        )
        self.alone: dict[str | None, Any] = {None: copy.deepcopy(base)}
        for seed, name in enumerate(("alice", "bob")):
            torch.manual_seed(seed + 1)
            model = fastlora.replace_linear(copy.deepcopy(base), CONFIG)
            fastlora.save_adapter(randomise_lora(model, 0.3), path / name)
            self.server.load_adapter(path / name, name)
            self.alone[name] = model

    @torch.no_grad()
    def row(self, name: str | None, given: dict[str, Tensor], i: int) -> Tensor:
        """What row i becomes by itself."""
        return first(self.alone[name](**{k: t[i : i + 1] for k, t in given.items()}))

    def agrees(self, given: dict[str, Tensor], names: list[str | None], **more: Any) -> None:
        """Each row is as it is by itself, and differs from what others would make of it."""
        got = first(self.server(**given, adapter_names=names, **more))
        for i, name in enumerate(names):
            assert error(got[i : i + 1], self.row(name, given, i)) < 1e-4, (i, name)
        rows = [self.row(name, given, 0) for name in self.alone]
        assert all(error(a, b) > 1e-2 for a, b in itertools.permutations(rows, 2))


def first(out: Any) -> Tensor:
    """The tensor that an output is about."""
    for name in ("logits", "last_hidden_state", "prediction_outputs", "text_embeds"):
        found = getattr(out, name, None)
        if isinstance(found, Tensor):
            return found
    return out if isinstance(out, Tensor) else out[0]


def two_images_and_none() -> tuple[Tensor, Tensor]:
    """Token ids of two texts, the first with two images of four tokens each; the images."""
    ids = torch.tensor([[IMAGE_TOKEN] * 8 + [5, 6], list(range(7, 17))])
    return ids, torch.randn(2, 3, 16, 16)
