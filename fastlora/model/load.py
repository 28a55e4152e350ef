"""Loading an adapter from PEFT's files into a model."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fastlora.adapters import base_copies, files
from fastlora.adapters.base_copies import Copies
from fastlora.config import LoRAConfig, has_split_base
from fastlora.config.listing import list_some
from fastlora.functional.receipt import Adapter
from fastlora.inspection.layers import get_matrix
from fastlora.inspection.wrappers import strip_wrappers, unwrap
from fastlora.model.adapter_tensors import KEYS, find_biases, list_adapter_shapes
from fastlora.model.record import (
    Injection,
    get_carried,
    get_injection,
    get_saved_modules,
    get_training_rows,
    remember,
)
from fastlora.model.replace import inject
from fastlora.model.report import report
from fastlora.model.targets import Plan, make_plan
from fastlora.modules import dtensors, saved_modules
from fastlora.modules.layer import LoRALayer, find_lora_layers
from fastlora.modules.saved_modules import SavedModule
from fastlora.modules.trained import find_trained_layers


def load_adapter(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    is_trainable: bool = False,
    adapter_name: str | None = None,
) -> nn.Module:
    """Loads an adapter that fastlora or PEFT saved into ``model``, in place; returns ``model``.

    - is_trainable: False freezes the adapter
    - adapter_name: which one to fill, where the model trains several; what its layers are set to
      must then be the file's settings

    Replaces the linears that the adapter's config names. Where the model has FastLoRALinear layers
    already, it fills exactly those and takes the file's settings. For a sharded model every process
    must call: each reads the files and keeps its part. Embeddings that PEFT has saved along are the
    base's, or rows that came with the adapter; those are put into the model's, as PEFT does.

    Warns where such rows are not the last ones, as a resized vocabulary's are, and where keys of
    alpha_pattern overlap in the alphabet's order, which is PEFT's and not the one that counted.

    Raises ValueError, the model unchanged, for an unsupported config, missing, unexpected or
    wrongly shaped tensors, ranks that disagree, truncated or oversized files and pickles, another
    vocabulary (the error names the call that resizes) or the frozen weights of another base;
    FileNotFoundError for a missing file; RuntimeError for a merged model, or flat parts of one
    (FSDP1, ZeRO).
    """
    dtensors.reshard(model)
    if adapter_name is not None:
        config = files.read_config(directory, is_trainable)
        return _load_one(model, directory, config, adapter_name, is_trainable)
    if next(find_trained_layers(unwrap(model)), None):
        raise ValueError("adapter_name: expected which of the model's adapters to fill, got None")
    read_adapter(model, directory, trainable=is_trainable).fill(model, is_trainable)
    return model


@dataclass(frozen=True)
class LoadedAdapter:
    """Adapter that was read from files and fits a model, which it has not changed yet."""

    config: LoRAConfig
    chosen: Plan | None  # the linears to replace, where the model has no LoRA layers yet
    tensors: dict[str, Tensor]
    biases: dict[str, nn.Parameter]
    copies: Copies

    def adapter_of(self, name: str, layer: LoRALayer) -> Adapter:
        """Returns (lora_A, lora_B, scaling) as ``layer``, of that name, will hold them."""
        A, B = (self.tensors[f"{name}.{KEYS[kind]}"] for kind in ("lora_A", "lora_B"))
        return A.to(layer.lora_A), B.to(layer.lora_B), self.config.scaling_of(name)

    def fill(self, model: nn.Module, is_trainable: bool = False) -> None:
        """Puts it into the model."""
        self.copies.warn(stacklevel=3)
        _fill_model(model, self, is_trainable)


def read_adapter(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    merged: bool = False,
    trainable: bool = False,
) -> LoadedAdapter:
    """Reads the adapter in ``directory`` for ``model``; merged: for one whose layers are."""
    config, inner = files.read_config(directory, trainable), unwrap(model)
    existing = dict(find_lora_layers(inner))
    chosen = None
    if existing:
        _check_existing(existing, config, merged)
        weights = {name: layer.matrix for name, layer in existing.items()}
    else:
        chosen = make_plan(inner, config)
        weights = {
            strip_wrappers(n): get_matrix(linear) for n, (linear, _) in chosen.linears.items()
        }
    expected = {
        key: shape
        for name, weight in weights.items()
        for key, shape in list_adapter_shapes(name, weight.shape, config).items()
    }
    trained = _find_saved(inner, config, chosen)
    saved_tensors = saved_modules.list_tensors(trained, config)
    biases = find_biases(inner, config, set(weights))
    biases = {key: bias for key, bias in biases.items() if key not in saved_tensors}
    expected |= {key: tuple(t.shape) for key, t in (biases | saved_tensors).items()}
    is_base_moved = has_split_base(config.init_lora_weights)
    remedy = "which is not swapped: unmerge_adapter, load_adapter and merge_adapter"
    copies = base_copies.read(
        directory,
        inner,
        weights,
        expected,
        trained,
        is_base_moved,
        merged,
        remedy if merged else None,
    )
    tensors = files.read_tensors(directory, expected, copies.names)
    return LoadedAdapter(config, chosen, tensors, biases, copies)


def _load_one(
    model: nn.Module,
    directory: str | os.PathLike[str],
    config: LoRAConfig,
    adapter_name: str,
    is_trainable: bool,
) -> nn.Module:
    """Fills one of the adapters that ``model`` trains side by side."""
    layers = dict(find_trained_layers(model))
    get_training_rows(model).index(adapter_name)
    config.check_plain("of adapters trained together none")
    expected = {}
    for name, layer in layers.items():
        _check_named(name, layer.r, config)
        if layer.scaling != config.scaling_of(name):
            raise ValueError(
                f"{name}: the layer scales by {layer.scaling:g}, the adapter by "
                f"{config.scaling_of(name):g}"
            )
        expected |= list_adapter_shapes(name, layer.matrix.shape, config)
    remedy = "and the base is that of all adapters: load it alone, into a model without the others"
    copies = base_copies.read(directory, model, layers, expected, fixed=remedy)
    tensors = files.read_tensors(directory, expected, copies.names)
    with torch.no_grad():
        for name, layer in layers.items():
            for kind, parameter in layer.adapter_parameters(adapter_name).items():
                dtensors.copy_whole(parameter, tensors[f"{name}.{KEYS[kind]}"])
                parameter.requires_grad_(is_trainable)
    return model


def _find_saved(
    model: nn.Module, config: LoRAConfig, chosen: Plan | None
) -> dict[str, SavedModule]:
    """Finds the modules that the adapter trains whole; one without a copy stands for its own."""
    if chosen is not None:
        return {name: SavedModule(module, module) for name, module in chosen.saved.items()}
    named, present = saved_modules.find(model, config), get_saved_modules(model)
    if named.keys() != present.keys():
        raise ValueError(
            f"modules_to_save: the model trains {list_some(present) or 'nothing'} whole, the "
            f"adapter {list_some(named) or 'nothing'}"
        )
    return present


def _check_existing(layers: dict[str, LoRALayer], config: LoRAConfig, merged: bool) -> None:
    for name, layer in layers.items():
        if layer.merged and not merged:
            raise RuntimeError(
                f"{name} is merged: unmerge_adapter before loading another adapter, or swap_adapter"
            )
        _check_named(name, layer.r, config)
        dtensors.check_whole(
            name, layer, layer.r, {"weight": layer.weight, **layer.adapter_parameters()}
        )
        if (layer.lora_bias is not None) != config.lora_bias:
            raise ValueError(f"{name}: lora_bias: the layer and the adapter's config disagree")
        layer_init, adapter_init = layer.init_lora_weights, config.init_lora_weights
        is_same = layer_init == adapter_init and layer.scaling == config.scaling_of(name)
        if (has_split_base(layer_init) or has_split_base(adapter_init)) and not is_same:
            raise ValueError(
                f"{name}: init_lora_weights: the adapter is for what {adapter_init!r} leaves of "
                f"the base at a scaling of {config.scaling_of(name):g}, the layer has what "
                f"{layer_init!r} leaves at {layer.scaling:g}: load it into the base itself"
            )


def _check_named(name: str, r: int, config: LoRAConfig) -> None:
    if not config.names(name):
        raise ValueError(f"{name}: the layer has LoRA, the adapter's config does not name it")
    if r != config.rank_of(name):
        raise ValueError(f"{name}: the layer has r={r}, the adapter r={config.rank_of(name)}")


def _fill_model(model: nn.Module, loaded: LoadedAdapter, is_trainable: bool) -> None:
    config, tensors, biases = loaded.config, loaded.tensors, loaded.biases
    # What an earlier adapter has put into the base is in it still.
    carried = get_carried(model) | loaded.copies.changes.keys()
    if loaded.chosen is not None:
        inject(model, config, loaded.chosen)
        remember(model, replace(get_injection(model), carried=carried))
    else:
        before = report(model).skipped
        remember(model, Injection(config, before, saved=get_saved_modules(model), carried=carried))
    loaded.copies.fill()
    with torch.no_grad():
        for key, bias in biases.items():
            dtensors.copy_whole(bias, tensors[key])
        for name, layer in find_lora_layers(model):
            layer.lora_alpha, layer.use_rslora = config.alpha_of(name), config.use_rslora
            layer.scaling, layer.lora_dropout = config.scaling_of(name), config.lora_dropout
            for kind, parameter in layer.adapter_parameters().items():
                dtensors.copy_whole(parameter, tensors[f"{name}.{KEYS[kind]}"])
                parameter.requires_grad_(is_trainable)
        for name, module in get_saved_modules(model).items():
            module.trained.requires_grad_(is_trainable)
            for key, tensor in saved_modules.list_state(name, module.trained).items():
                dtensors.copy_whole(tensor, tensors[key])
    for bias in biases.values():
        bias.requires_grad_(is_trainable)
