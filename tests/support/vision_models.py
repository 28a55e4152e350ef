"""Tiny models with a vision tower, a projector and a decoder."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn

_TEXT = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 64,
}
_VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
_IMAGE, _START, _END = 60, 58, 59


def llava() -> nn.Module:
    return transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(
            text_config={"model_type": "llama", **_TEXT},
            vision_config={"model_type": "clip_vision_model", **_VISION},
            image_token_index=_IMAGE,
            vision_feature_layer=-1,
        )
    )


def gemma3() -> nn.Module:
    return transformers.Gemma3ForConditionalGeneration(
        transformers.Gemma3Config(
            text_config={**_TEXT, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8},
            vision_config={
                "model_type": "siglip_vision_model",
                "vision_use_head": False,
                **_VISION,
            },
            mm_tokens_per_image=4,
            image_token_index=_IMAGE,
            boi_token_index=_START,
            eoi_token_index=_END,
        )
    )


def qwen2_5_vl() -> nn.Module:
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2}
    vision |= {"patch_size": 4, "out_hidden_size": 16, "fullatt_block_indexes": [0]}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    return transformers.Qwen2_5_VLForConditionalGeneration(
        transformers.Qwen2_5_VLConfig(
            text_config={**_TEXT, "rope_parameters": rope, "bos_token_id": 1, "eos_token_id": 2},
            vision_config={**vision, "window_size": 16},
            image_token_id=_IMAGE,
            video_token_id=61,
            vision_start_token_id=_START,
            vision_end_token_id=_END,
        )
    )


def randomise_weights(model: nn.Module) -> nn.Module:
    """With signed weights of a size that every layer shows in the output."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


def image_logits(model: Any, **options: Any) -> Tensor:
    """The logits (1, 7, 64) of an image of four tokens within three of text."""
    ids = torch.tensor([[3, _START, _IMAGE, _IMAGE, _IMAGE, _IMAGE, 7]])
    generator = torch.Generator().manual_seed(1)
    if model.config.model_type == "qwen2_5_vl":
        pixels = torch.randn(16, 3 * 2 * 4 * 4, generator=generator)
        options |= {
            "image_grid_thw": torch.tensor([[1, 4, 4]]),
            "mm_token_type_ids": (ids == _IMAGE).int(),
        }
    else:
        pixels = torch.randn(1, 3, 8, 8, generator=generator)
    with torch.no_grad():
        return model(input_ids=ids, pixel_values=pixels, **options).logits
