"""Saving a model's adapter in PEFT's files."""

from __future__ import annotations

import os
from collections.abc import Iterator

from torch import Tensor, nn

from fastlora.adapters import base_copies, files
from fastlora.config import LoRAConfig, matching
from fastlora.inspection.wrappers import strip_wrappers, unwrap
from fastlora.model.adapter_tensors import KEYS, find_biases
from fastlora.model.record import (
    get_carried,
    get_injection,
    get_saved_modules,
    get_training_rows,
    make_missing_error,
)
from fastlora.modules import dtensors, saved_modules
from fastlora.modules.layer import LoRALayer, find_lora_layers
from fastlora.modules.trained import TrainableMultiLoRALinear, find_trained_layers


def adapter_state_dict(model: nn.Module, adapter_name: str | None = None) -> dict[str, Tensor]:
    """Returns the adapter's tensors by PEFT's names, not copied, with biases and whole modules.

    - adapter_name: which adapter, where the model trains several

    The tensors of a sharded model (``fully_shard``, tensor parallelism) are DTensors.

    Raises ValueError for a name that the model does not have; RuntimeError when it has no
    FastLoRALinear, or its adapter is merged or in flat parts (FSDP1, ZeRO).
    """
    tensors = _list_tensors(model, adapter_name)
    return {files.PREFIX + name: tensor for name, tensor in tensors.items()}


def save_adapter(
    model: nn.Module, directory: str | os.PathLike[str], *, adapter_name: str | None = None
) -> None:
    """Writes ``adapter_config.json`` and ``adapter_model.safetensors``, which PEFT reads too.

    - adapter_name: which adapter, where the model trains several

    For a sharded model (``fully_shard``, tensor parallelism) every process must call: the tensors
    are gathered, the process of rank 0 writes, and the others return when it has. Embeddings into
    which ``load_adapter`` has put an adapter's rows are saved along.

    Raises RuntimeError when the model has no adapter, or it is merged or in flat parts (FSDP1,
    ZeRO); ValueError for a bad directory or a name that the model does not have.
    """
    dtensors.reshard(model)
    tensors = _list_tensors(model, adapter_name)
    settings = get_injection(model).config
    base = settings.base_model_name_or_path or getattr(
        getattr(unwrap(model), "config", None), "name_or_path", None
    )
    layers = list(_iterate_layers(model))
    values = settings.to_dict() | {"base_model_name_or_path": base or None}
    # PEFT's word for all layers is how the last of them lies.
    values["fan_in_fan_out"] = layers[-1][1].fan_in_fan_out
    if settings.all_linear:
        # As PEFT does: the file names the layers, so that it means the same to every reader.
        names, adapted = [name for name, _ in layers], {layer for _, layer in layers}
        modules = unwrap(model).named_modules(remove_duplicate=False)
        others = {strip_wrappers(name) for name, module in modules if module not in adapted} - {
            *names
        }
        values["target_modules"] = matching.name_exactly(names, others)
    with dtensors.gather(tensors) as whole:
        if whole is not None:
            files.write(directory, LoRAConfig.from_dict(values), whole)


def _iterate_layers(model: nn.Module) -> Iterator[tuple[str, LoRALayer | TrainableMultiLoRALinear]]:
    yield from find_lora_layers(model)
    yield from find_trained_layers(model)


def _list_tensors(model: nn.Module, adapter_name: str | None = None) -> dict[str, Tensor]:
    layers, trained = dict(find_lora_layers(model)), dict(find_trained_layers(model))
    if trained or adapter_name is not None:
        get_training_rows(model).index(adapter_name)
        for name, layer in trained.items():
            parameters = layer.adapter_parameters(str(adapter_name))
            dtensors.check_whole(name, layer, layer.r, parameters)
        return {
            f"{name}.{KEYS[kind]}": parameter
            for name, layer in trained.items()
            for kind, parameter in layer.adapter_parameters(str(adapter_name)).items()
        }
    if not layers:
        raise make_missing_error(model)
    merged = [name for name, layer in layers.items() if layer.merged]
    if merged:
        raise RuntimeError(
            f"model: {len(merged)} layers are merged ({merged[0]}, …): unmerge_adapter first, or "
            "save the whole model after merge_and_unload"
        )
    for name, layer in layers.items():
        dtensors.check_whole(name, layer, layer.r, layer.adapter_parameters())
    tensors: dict[str, Tensor] = {
        f"{name}.{KEYS[kind]}": parameter
        for name, layer in layers.items()
        for kind, parameter in layer.adapter_parameters().items()
    }
    inner, config = unwrap(model), get_injection(model).config
    saved_tensors = saved_modules.list_tensors(get_saved_modules(inner), config)
    bases = base_copies.find_base_tensors(inner, layers, get_saved_modules(inner))
    tensors |= {name: bases[name] for name in sorted(get_carried(inner)) if name in bases}
    return tensors | find_biases(inner, config, set(layers)) | saved_tensors
