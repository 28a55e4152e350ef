"""Adapters to merge into files: PEFT's folders, by layer, with a weight each."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from fastlora.adapters import files
from fastlora.adapters.base_copies import strip_peft_wrappers
from fastlora.adapters.stored import Stored
from fastlora.config import LoRAConfig, check_number, has_split_base
from fastlora.merge_files import durable

_PARTS = {".lora_A.weight": "lora_A", ".lora_B.weight": "lora_B", ".lora_B.bias": "lora_bias"}


@dataclass(frozen=True)
class Layer:
    """Layer of an adapter: lora_A (R, K), lora_B (N, R), lora_bias (N,); scaling by its weight."""

    lora_A: Tensor
    lora_B: Tensor
    lora_bias: Tensor | None
    scaling: float


@dataclass(frozen=True)
class AdapterFolder:
    """Adapter's tensors by the layer's name, without PEFT's prefix.

    biases: the base's, trained. copies: the base's weights by name, which PEFT saves along where an
    embedding is a target or was resized; they stay in the file. digest: of config and weights.
    """

    folder: Path
    weight: float
    config: LoRAConfig
    layers: dict[str, Layer]
    biases: dict[str, Tensor]
    copies: dict[str, Stored]
    digest: str

    def names(self, layer: str) -> bool:
        """Whether the config asks for a layer of this name."""
        return not self.config.all_linear and self.config.names(layer)


def read_adapter(directory: str | os.PathLike[str], weight: float = 1.0) -> AdapterFolder:
    """Reads and checks the adapter in ``directory``, whose scaling ``weight`` multiplies.

    Raises ValueError or FileNotFoundError for whatever ``load_adapter`` would refuse, for numbers
    that are not finite, and for a weight that is not.
    """
    folder = Path(directory)
    if not folder.is_dir():
        raise FileNotFoundError(f"adapter: expected a folder, got {folder}")
    check_number("weight", weight)
    config = files.read_config(folder)
    _check_mergeable(folder, config)
    shapes = files.read_shapes(folder)
    along = {name for name in shapes if _is_copy(name, config)}
    copies = {
        strip_peft_wrappers(n): Stored(folder / files.WEIGHTS_NAME, files.PREFIX + n) for n in along
    }
    _check_finite(folder, copies)
    lora_shapes = {name: shape for name, shape in shapes.items() if name not in along}
    tensors = files.read_tensors(folder, lora_shapes, along)
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{folder}: {name}: expected finite numbers, it has others")
    digest = "".join(
        durable.digest_file(folder / name).sha256
        for name in (files.CONFIG_NAME, files.WEIGHTS_NAME)
    )
    parts: dict[str, dict[str, Tensor]] = {}
    biases: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        end = next((end for end in _PARTS if name.endswith(end)), None)
        if end is not None:
            parts.setdefault(name.removesuffix(end), {})[_PARTS[end]] = tensor
        elif name.endswith(".bias") and config.bias != "none":
            biases[_name_layer(name)] = tensor
        else:
            raise ValueError(f"{folder}: expected lora_A and lora_B of linear layers, got {name}")
    if not parts:
        raise ValueError(f"{folder}: expected lora_A and lora_B of some layer, found none")
    layers = {name: _make_layer(folder, config, name, part, weight) for name, part in parts.items()}
    return AdapterFolder(folder, weight, config, layers, biases, copies, digest)


def _is_copy(name: str, config: LoRAConfig) -> bool:
    trained = name.endswith(".bias") and config.bias != "none"
    return name.endswith((".weight", ".bias")) and ".lora_" not in name and not trained


def _check_finite(folder: Path, copies: dict[str, Stored]) -> None:
    for name, stored in copies.items():
        if not all(rows.isfinite().all() for _, rows in stored.chunks()):
            raise ValueError(f"{folder}: {name}: expected finite numbers, it has others")


def _check_mergeable(folder: Path, config: LoRAConfig) -> None:
    if config.modules_to_save:
        raise ValueError(
            f"{folder}: it has trained modules whole (modules_to_save="
            f"{list(config.modules_to_save)}), which files are not merged with: load it into the "
            "model, merge_and_unload, and save that"
        )
    if has_split_base(config.init_lora_weights):
        raise ValueError(
            f"{folder}: init_lora_weights={config.init_lora_weights!r} has split the base's "
            "weights: load it into the model, which splits them again, merge_and_unload, and save "
            "that"
        )


def _name_layer(name: str) -> str:
    return name.rpartition(".")[0].removesuffix(".base_layer")


def _make_layer(
    folder: Path, config: LoRAConfig, name: str, parts: dict[str, Tensor], weight: float
) -> Layer:
    where, r = f"{folder}: {name}", config.rank_of(name)
    expected = {"lora_A", "lora_B"} | ({"lora_bias"} if config.lora_bias else set())
    if parts.keys() != expected:
        raise ValueError(
            f"{where}: expected {', '.join(sorted(expected))}, got {', '.join(sorted(parts))}"
        )
    if not config.names(name):
        raise ValueError(f"{where}: the config does not name this layer")
    A, B, bias = parts["lora_A"], parts["lora_B"], parts.get("lora_bias")
    if A.dim() != 2 or B.dim() != 2 or A.shape[0] != r or B.shape[1] != r:
        raise ValueError(
            f"{where}: expected lora_A ({r}, K) and lora_B (N, {r}), got {tuple(A.shape)} and "
            f"{tuple(B.shape)}"
        )
    if bias is not None and tuple(bias.shape) != (B.shape[0],):
        raise ValueError(f"{where}: lora_B.bias: expected ({B.shape[0]},), got {tuple(bias.shape)}")
    scaling = config.scaling_of(name) * weight
    if not math.isfinite(scaling):
        raise ValueError(f"{where}: expected a finite scaling, got {scaling}")
    return Layer(A, B, bias, scaling)
