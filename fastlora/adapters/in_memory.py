"""An adapter in memory: the tensors and the config that a training loop sends."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

from torch import Tensor

from fastlora.adapters import files, hints
from fastlora.adapters.files import PREFIX, Shape
from fastlora.config import LoRAConfig, refusals


def resolve_config(config: object, shapes: Mapping[str, Shape]) -> LoRAConfig:
    """Makes settings of a LoRAConfig, PEFT's, or its file's fields, for tensors of these shapes.

    Raises TypeError or ValueError; warns as reading the file would.
    """
    if isinstance(config, LoRAConfig):
        return config
    if isinstance(config, Mapping):
        fields: Any = config
    else:
        LoRAConfig.check_pefts(config)
        fields = config.to_dict()  # pyright: ignore[reportAttributeAccessIssue]
    settings = LoRAConfig.from_dict(refusals.drop_history(fields))
    return (
        files.restore_order("config", settings, shapes) if isinstance(config, Mapping) else settings
    )


def index_by_name(tensors: object) -> dict[str, Tensor]:
    """Returns the tensors by names without PEFT's prefix; TypeError or ValueError for others."""
    if not isinstance(tensors, Mapping):
        raise TypeError(
            f"tensors: expected {{name: tensor}}, as adapter_state_dict gives them, got {tensors!r}"
        )
    hints.check_names("tensors", map(str, tensors))
    named: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = str(key).removeprefix(PREFIX)
        if name in named:
            raise ValueError(
                f"tensors: {name} is given twice, with {PREFIX!r} before it and without"
            )
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.is_meta:
            kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"tensors: {name}: expected a tensor of floats, got {kind}")
        if hasattr(tensor, "full_tensor"):
            raise TypeError(f"tensors: {name}: expected all of it, got a DTensor: full_tensor() it")
        named[name] = tensor
    return named


def copy_expected(
    tensors: Mapping[str, Tensor], expected: Mapping[str, Shape], besides: Set[str]
) -> dict[str, Tensor]:
    """Copies exactly the expected ones to the CPU, beside which ``besides`` may be there."""
    files.compare_shapes("tensors", read_shapes(tensors), expected, besides)
    return {name: tensors[name].detach().to("cpu", copy=True).contiguous() for name in expected}


def read_shapes(tensors: Mapping[str, Tensor]) -> dict[str, Shape]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}
