"""Models whose images belong to the prompts that have tokens for them.

Models are known by the names of transformers' classes, as of its 5.23. Nowhere else is an image
taken for a row of the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from torch import Tensor, nn

# {name of an input: the row of input_ids of each index of its first dimension}
RowsByInput = dict[str, list[int]]


def find_image_rows(model: nn.Module, inputs: Mapping[str, Any]) -> RowsByInput | None:
    """Finds the rows of a known model's images; None for other models, and without images.

    Rows are those of input_ids. An input that is not told apart is left out.
    """
    assign_rows = _MODELS.get(type(model).__name__)
    images = ("pixel_values", "pixel_values_videos")
    if assign_rows is None or not any(inputs.get(name) is not None for name in images):
        return None
    if not type(model).__module__.startswith("transformers."):
        return None
    ids = inputs.get("input_ids")
    return assign_rows(model, inputs, ids) if isinstance(ids, Tensor) and ids.dim() == 2 else {}


def _count_tokens(ids: Tensor, token: object) -> list[int]:
    """Counts such tokens in each text."""
    return (ids == token).sum(1).tolist() if isinstance(token, int) else [0] * len(ids)


def _assign_in_order(sizes: list[int], counts: list[int]) -> list[int] | None:
    """Gives images of so many tokens to texts: the first text's images come first."""
    owners, remaining, row = [], list(counts), 0
    for size in sizes:
        while row < len(remaining) and remaining[row] == 0:
            row += 1
        if row == len(remaining) or size <= 0 or remaining[row] < size:
            return None
        remaining[row] -= size
        owners.append(row)
    return owners if not any(remaining) else None


def _assign_equally(model: Any, inputs: Mapping[str, Any], ids: Tensor) -> RowsByInput:
    """Gives images to texts where all images have as many tokens."""
    images = inputs.get("pixel_values")
    counts = _count_tokens(ids, getattr(model.config, "image_token_id", None))
    if not isinstance(images, Tensor) or not len(images) or sum(counts) % len(images):
        return {}
    if inputs.get("image_sizes") is not None:
        return {}
    owners = _assign_in_order([sum(counts) // len(images)] * len(images), counts)
    return {} if owners is None else {"pixel_values": owners}


def _assign_by_grid(model: Any, inputs: Mapping[str, Any], ids: Tensor) -> RowsByInput:
    """Gives patches to texts: an image's patches lie together, and merged ones are a token each."""
    merged = model.config.vision_config.spatial_merge_size**2
    rows: RowsByInput = {}
    for pixels, grid, token in (
        ("pixel_values", "image_grid_thw", "image_token_id"),
        ("pixel_values_videos", "video_grid_thw", "video_token_id"),
    ):
        if not isinstance(inputs.get(pixels), Tensor) or not isinstance(inputs.get(grid), Tensor):
            continue
        patches = inputs[grid].prod(-1).tolist()
        counts = _count_tokens(ids, getattr(model.config, token, None))
        owners = _assign_in_order([n // merged for n in patches], counts)
        if owners is not None and sum(patches) == len(inputs[pixels]):
            rows[pixels] = np.repeat(owners, patches).tolist()
    return rows


def _assign_pairs(model: Any, inputs: Mapping[str, Any], ids: Tensor) -> RowsByInput:
    """Gives image i to text i where the loss is asked for; without it every pair counts."""
    images = inputs.get("pixel_values")
    if not inputs.get("return_loss") or not isinstance(images, Tensor) or len(images) != len(ids):
        return {}
    return {"pixel_values": list(range(len(ids)))}


_MODELS: dict[str, Callable[[Any, Mapping[str, Any], Tensor], RowsByInput]] = {
    "LlavaForConditionalGeneration": _assign_equally,
    "LlavaModel": _assign_equally,
    "Qwen2VLForConditionalGeneration": _assign_by_grid,
    "Qwen2VLModel": _assign_by_grid,
    "Qwen2_5_VLForConditionalGeneration": _assign_by_grid,
    "Qwen2_5_VLModel": _assign_by_grid,
    "CLIPModel": _assign_pairs,
    "SiglipModel": _assign_pairs,
}
