"""Folders of adapters, combined into one that PEFT and fastlora load."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from fastlora.adapters import base_copies, files
from fastlora.adapters.combine import Combination, check_adapter, check_weights
from fastlora.adapters.stored import Stored, have_same_rows
from fastlora.config import LoRAConfig, matching
from fastlora.functional.receipt import Adapter

# What chooses layers in a config.
_CHOICE = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
_A, _B = ".lora_A.weight", ".lora_B.weight"


def combine_adapters(
    directories: Sequence[str | os.PathLike[str]],
    weights: Sequence[float],
    directory: str | os.PathLike[str],
    *,
    combination_type: str = "svd",
    svd_rank: int | None = None,
    svd_clamp: float | None = None,
    svd_full_matrices: bool = False,
    svd_driver: str | None = None,
    density: float | None = None,
    majority_sign_method: str = "total",
    device: torch.device | str | None = None,
) -> LoRAConfig:
    """Combines the adapters in ``directories`` into one in ``directory``; returns its config.

    - combination_type and its options: as in ``combining.combine``, which explains them
    - svd_rank: None is the largest rank in any of the configs
    - device: where to compute; None is the CPU

    Each layer is combined by itself; one that only some of the adapters have is combined of those.
    The new config is the first adapter's but for its ranks, its layers and its scaling, which is 1
    everywhere. Random entries are drawn in alphabetical order of the layers. Embeddings of the base
    that adapters have along go along; they must be the same in all that have them.

    Raises ValueError, nothing written, for what ``load_adapter`` refuses in a file, for biases of
    an adapter's own (lora_bias or bias), modules_to_save, split bases (init_lora_weights), layers
    of other shapes or ranks than the type takes, embeddings that differ (rows that were added, or
    trained, or of two bases), and bad options; FileNotFoundError for a missing file;
    FileExistsError when ``directory`` holds an adapter already.
    """
    combination = Combination(
        combination_type,
        svd_rank,
        svd_clamp,
        svd_full_matrices,
        svd_driver,
        density,
        majority_sign_method,
    )
    check_weights(weights, "directories", directories)
    _check_free(directory)
    sources = [_read(folder) for folder in directories]
    combination = combination.for_count(len(sources))
    if svd_rank is None:
        combination = replace(
            combination, svd_rank=max(_find_largest_rank(s.config) for s in sources)
        )
    layers: dict[str, Adapter] = {}
    for name in sorted({name for source in sources for name in source.layers}):
        shares = [
            (_move(device, source.layers[name]), weight)
            for source, weight in zip(sources, weights, strict=True)
            if name in source.layers
        ]
        try:
            layers[name] = combination.apply([a for a, _ in shares], [w for _, w in shares])
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    config, copies = _make_config(sources, layers), _find_copies(directories, sources)
    tensors = {name + _A: A for name, (A, _, _) in layers.items()}
    tensors |= {name + _B: B for name, (_, B, _) in layers.items()}
    for name, stored in copies.items():
        owner, _, kind = name.rpartition(".")
        tensors[f"{owner}.base_layer.{kind}" if owner in layers else name] = stored.read()
    files.write(directory, config, tensors)
    return config


class _Source(NamedTuple):
    config: LoRAConfig
    layers: dict[str, Adapter]
    copies: dict[str, Stored]


def _find_copies(
    directories: Sequence[str | os.PathLike[str]], sources: Sequence[_Source]
) -> dict[str, Stored]:
    """Finds the base's embeddings that any of the files has; ValueError where two differ."""
    first_copies: dict[str, tuple[str | os.PathLike[str], Stored]] = {}
    for folder, source in zip(directories, sources, strict=True):
        for name, stored in source.copies.items():
            first, other = first_copies.setdefault(name, (folder, stored))
            if not have_same_rows(stored, other):
                raise ValueError(
                    f"{first} and {folder}: they have different rows of {name}, and of two "
                    "bases or vocabularies there is no sum"
                )
    return {name: stored for name, (_, stored) in first_copies.items()}


def _read(folder: str | os.PathLike[str]) -> _Source:
    """Reads an adapter without its model: its layers are those that the file has."""
    config = files.read_config(folder)
    folder_path = Path(folder)
    try:
        config.check_plain("of adapters to combine none")
    except ValueError as error:
        raise ValueError(f"{folder_path / files.CONFIG_NAME}: {error}") from None
    shapes = files.read_shapes(folder)
    names = {key.removesuffix(end) for key in shapes for end in (_A, _B) if key.endswith(end)}
    if not names:
        raise ValueError(f"{folder_path / files.WEIGHTS_NAME}: expected a LoRA layer, found none")
    expected: dict[str, files.Shape] = {}
    for name in names:
        if not config.names(name):
            raise ValueError(f"{folder_path}: {name} has tensors, but the config does not name it")
        r, K, N = config.rank_of(name), shapes.get(name + _A, ())[1:], shapes.get(name + _B, ())[:1]
        expected |= {name + _A: (r, *K), name + _B: (*N, r)}
    weights_path = folder_path / files.WEIGHTS_NAME
    embedding_names = base_copies.find_embedding_tensors(shapes, expected)
    copies = {
        base_copies.strip_peft_wrappers(name): Stored(weights_path, files.PREFIX + name)
        for name in embedding_names
    }
    tensors = files.read_tensors(folder, expected, embedding_names)
    layers = {}
    for name in names:
        layers[name] = tensors[name + _A], tensors[name + _B], config.scaling_of(name)
        check_adapter(f"{folder_path}: {name}", layers[name])
    return _Source(config, layers, copies)


def _make_config(sources: Sequence[_Source], layers: Mapping[str, Adapter]) -> LoRAConfig:
    """Makes the first config one of these layers and ranks; lora_alpha is r: scaling is 1."""
    ranks = {name: A.shape[0] for name, (A, _, _) in layers.items()}
    r = Counter(ranks.values()).most_common(1)[0][0]
    others = {matching.escape_name(name): rank for name, rank in ranks.items() if rank != r}
    first = sources[0].config
    chosen = {name: getattr(first, name) for name in _CHOICE}
    alike = all(
        source.layers.keys() == layers.keys()
        and {name: getattr(source.config, name) for name in _CHOICE} == chosen
        for source in sources
    )
    if not alike:
        # A bare name may well be the end of another layer's, which is not to be seen here.
        bare = (f"*.{name}" for name in layers if "." not in name)
        chosen = dict.fromkeys(_CHOICE) | {"target_modules": matching.name_exactly(layers, bare)}
    return replace(
        first,
        r=r,
        lora_alpha=r,
        use_rslora=False,
        rank_pattern=others,
        alpha_pattern=others,
        **chosen,
    )


def _find_largest_rank(config: LoRAConfig) -> int:
    return max([config.r, *config.rank_pattern.values()])


def _move(device: torch.device | str | None, adapter: Adapter) -> Adapter:
    A, B, scaling = adapter
    return A.to(device or "cpu"), B.to(device or "cpu"), scaling


def _check_free(directory: str | os.PathLike[str]) -> None:
    for name in (files.CONFIG_NAME, files.WEIGHTS_NAME, "adapter_model.bin"):
        if (Path(directory) / name).exists():
            raise FileExistsError(f"directory: {directory} already holds {name}: not overwritten")
