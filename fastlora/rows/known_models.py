"""Models whose images go to prompts by the tokens that stand for them.

By the names of transformers' classes: what is said here was read in its 5.23, and nowhere else is
an image taken for a row of the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from torch import Tensor, nn

# {name of an input: the row of input_ids of each index of its first dimension}
Rows = dict[str, list[int]]


def rows_of_inputs(model: nn.Module, given: Mapping[str, Any]) -> Rows | None:
    """Of a forward's inputs to a model that is known; None of any other, and without images.

    Rows are those of input_ids. An input that is not told apart is left out.
    """
    known = _KNOWN.get(type(model).__name__)
    seen = ("pixel_values", "pixel_values_videos")
    if known is None or not any(given.get(name) is not None for name in seen):
        return None
    if not type(model).__module__.startswith("transformers."):
        return None
    ids = given.get("input_ids")
    return known(model, given, ids) if isinstance(ids, Tensor) and ids.dim() == 2 else {}


def _tokens(ids: Tensor, token: object) -> list[int]:
    """How many of them each text has."""
    return (ids == token).sum(1).tolist() if isinstance(token, int) else [0] * len(ids)


def _in_order(sizes: list[int], counts: list[int]) -> list[int] | None:
    """The text of each image of so many tokens: the first text's images come first."""
    owners, left, row = [], list(counts), 0
    for size in sizes:
        while row < len(left) and left[row] == 0:
            row += 1
        if row == len(left) or size <= 0 or left[row] < size:
            return None
        left[row] -= size
        owners.append(row)
    return owners if not any(left) else None


def _alike(model: Any, given: Mapping[str, Any], ids: Tensor) -> Rows:
    """All images have as many tokens."""
    images = given.get("pixel_values")
    counts = _tokens(ids, getattr(model.config, "image_token_id", None))
    if not isinstance(images, Tensor) or not len(images) or sum(counts) % len(images):
        return {}
    if given.get("image_sizes") is not None:
        return {}
    owners = _in_order([sum(counts) // len(images)] * len(images), counts)
    return {} if owners is None else {"pixel_values": owners}


def _by_grid(model: Any, given: Mapping[str, Any], ids: Tensor) -> Rows:
    """Rows of the input are patches, an image's together; merged ones are a token each."""
    merged = model.config.vision_config.spatial_merge_size**2
    found: Rows = {}
    for pixels, grid, token in (
        ("pixel_values", "image_grid_thw", "image_token_id"),
        ("pixel_values_videos", "video_grid_thw", "video_token_id"),
    ):
        if not isinstance(given.get(pixels), Tensor) or not isinstance(given.get(grid), Tensor):
            continue
        patches = given[grid].prod(-1).tolist()
        counts = _tokens(ids, getattr(model.config, token, None))
        owners = _in_order([n // merged for n in patches], counts)
        if owners is not None and sum(patches) == len(given[pixels]):
            found[pixels] = np.repeat(owners, patches).tolist()
    return found


def _pairs(model: Any, given: Mapping[str, Any], ids: Tensor) -> Rows:
    """Image i is text i's where the loss is asked for, which has them so; else every pair is."""
    images = given.get("pixel_values")
    if not given.get("return_loss") or not isinstance(images, Tensor) or len(images) != len(ids):
        return {}
    return {"pixel_values": list(range(len(ids)))}


_KNOWN: dict[str, Callable[[Any, Mapping[str, Any], Tensor], Rows]] = {
    "LlavaForConditionalGeneration": _alike,
    "LlavaModel": _alike,
    "Qwen2VLForConditionalGeneration": _by_grid,
    "Qwen2VLModel": _by_grid,
    "Qwen2_5_VLForConditionalGeneration": _by_grid,
    "Qwen2_5_VLModel": _by_grid,
    "CLIPModel": _pairs,
    "SiglipModel": _pairs,
}
